package control

import (
	"fmt"
	"log/slog"
	"maps"
	"os"
	"time"

	"example.com/tableflip/internal/event"
)

// This file owns what a process remembers of upgrades: how the last one went, and the
// counters.

// A lastUpgrade is how the last upgrade went that this process knows of: the one that
// put it in charge, or one that has failed since.
type lastUpgrade struct {
	Time  time.Time `json:"time"` // when it ended
	PID   int       `json:"pid"`  // of the new process, 0 if none was started
	Error string    `json:"error,omitempty"`
}

// Counters are what has happened to the service since its first generation was started.
type Counters struct {
	// Upgrades is how many upgrades have put a new process in charge.
	Upgrades int `json:"upgrades"`

	// Failures is how many upgrades have failed, by cause: the attribute "cause" of the
	// event "failed".
	Failures map[string]int `json:"failures"`

	// Drains is how many generations have drained to their end after an upgrade, and
	// DrainSeconds how long they took in all.
	Drains       int     `json:"drains"`
	DrainSeconds float64 `json:"drainSeconds"`

	// ConnectionsCut is how many connections they have cut in the end.
	ConnectionsCut int `json:"connectionsCut"`
}

// A history has a goroutine that reads events, and answers those who ask what it
// remembers: what was published before they ask is in the answer.
type history struct {
	asks  chan chan memory
	edits chan func(*memory)
	close func()        // ends the goroutine
	ended chan struct{} // closed when it has
	final memory        // then
}

// A memory is what a history remembers.
type memory struct {
	self     int          // the number of this generation
	last     *lastUpgrade // nil if there was none
	counters Counters
}

func remember(generation int) *history {
	events, cancel := event.Subscribe()
	h := &history{asks: make(chan chan memory), edits: make(chan func(*memory)), close: cancel, ended: make(chan struct{})}
	go h.run(events, memory{self: generation, counters: Counters{
		Upgrades: generation - 1,
		Failures: map[string]int{},
	}})
	return h
}

func (h *history) run(events <-chan event.Event, m memory) {
	defer close(h.ended)
	for {
		select {
		case e, ok := <-events:
			if !ok {
				h.final = m
				return
			}
			m.note(e)
		case edit := <-h.edits:
			edit(&m)
		case reply := <-h.asks:
			for pending := true; pending; {
				select {
				case e := <-events: // of no name once it is closed
					pending = e.Name != ""
					m.note(e)
				default:
					pending = false
				}
			}
			reply <- m.clone()
		}
	}
}

// recall returns what is remembered, after close what was until then.
func (h *history) recall() memory {
	reply := make(chan memory, 1)
	select {
	case h.asks <- reply:
		return <-reply
	case <-h.ended:
		return h.final.clone()
	}
}

// change has what is remembered changed.
func (h *history) change(edit func(*memory)) {
	select {
	case h.edits <- edit:
	case <-h.ended:
	}
}

// add adds what the process before this one has counted. Both know the Upgrades.
func (c *Counters) add(before Counters) {
	for cause, n := range before.Failures {
		c.Failures[cause] += n
	}
	c.Drains += before.Drains
	c.DrainSeconds += before.DrainSeconds
	c.ConnectionsCut += before.ConnectionsCut
}

// Counters returns what has happened until now.
func (s *Server) Counters() Counters { return s.history.recall().counters }

func (m memory) clone() memory {
	m.counters.Failures = maps.Clone(m.counters.Failures)
	return m
}

func (m *memory) note(e event.Event) {
	attrs := map[string]slog.Value{}
	for _, a := range e.Attrs {
		attrs[a.Key] = a.Value
	}
	if _, ok := attrs["rehearsal"]; ok {
		return
	}
	switch e.Name {
	case event.InCharge:
		if m.counters.Upgrades > 0 {
			m.last = &lastUpgrade{Time: e.Time, PID: os.Getpid()}
		}
	case event.Committed:
		m.counters.Upgrades++
		m.last = &lastUpgrade{Time: e.Time, PID: pidOf(e)}
	case event.Failed:
		m.counters.Failures[attrs["cause"].String()]++
		m.last = &lastUpgrade{Time: e.Time, PID: pidOf(e), Error: attrs["error"].String()}
	case event.Ended:
		// Of this process's successor, no more is said than that it has ended. A later one
		// that has drained was undone on trial.
		if took, ok := attrs["took"]; ok && attrs["generation"].Int64() < int64(m.self) {
			m.counters.Drains++
			m.counters.DrainSeconds += took.Duration().Seconds()
		}
	}
}

func (l lastUpgrade) String() string {
	result := fmt.Sprintf("put process %d in charge", l.PID)
	if l.Error != "" {
		result = "failed: " + l.Error
	}
	return fmt.Sprintf("%s at %s", result, l.Time.Local().Format(time.DateTime))
}
