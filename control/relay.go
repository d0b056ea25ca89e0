package control

import (
	"context"
	"encoding/json"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/link"
)

// This file owns what a process that drains says of that: to those who watch it, and to
// the process in charge, for the status and the counters.

// meeting is the name of the file by which generations find each other.
const meeting = "tableflip/control"

// sendTimeout is how long a process that drains waits for another, which may be
// suspended. It is a variable for tests.
var sendTimeout = time.Second / 2

// A report is what a process that drains tells the process in charge.
type report struct {
	PID         int       `json:"pid"`
	Counters    *Counters `json:"counters,omitempty"`    // when it is replaced
	Connections *int      `json:"connections,omitempty"` // while it drains
	Cut         int       `json:"cut,omitempty"`         // connections, when it has drained
}

// A relay passes reports on to the process in charge. Each process reports to the oldest
// of those that came after it: who has just come may fail, and who has been replaced
// passes on what it gets.
type relay struct {
	meeting *link.Meeting // nil if there is none

	mu          sync.Mutex
	connections map[int]int   // of those that drain, by PID
	passesOn    bool          // this process has passed on what it knows
	newer       []*link.Link  // to those that came after this process and live, oldest first
	came        chan struct{} // closed, and replaced, when there is another
	left        chan struct{} // closed once nobody can come any more
}

// join never fails: without a meeting the status says less.
func (s *Server) join() {
	m, err := link.Join(s.upg, meeting)
	if err != nil {
		s.opts.Logger.Error("control: the status will not say what other generations do", "error", err)
		return
	}
	s.relay.meeting = m
}

// hear heeds what older generations report, until their ends or Close.
func (s *Server) hear() {
	if s.relay.meeting == nil {
		return
	}
	go s.follow()
	for _, l := range s.relay.meeting.Older() {
		go receive(l, func(message []byte) {
			var r report
			if json.Unmarshal(message, &r) == nil {
				s.heed(r)
			}
		})
	}
}

// receive calls heed for each message, until the other process or the link ends.
func receive(l *link.Link, heed func(message []byte)) {
	for {
		message, files, err := l.Receive(context.Background())
		for _, file := range files { // of a later version
			file.Close()
		}
		if err != nil {
			return
		}
		heed(message)
	}
}

func (s *Server) heed(r report) {
	if !s.keep(r) {
		s.report(r)
	}
}

// keep notes a report, unless this process has passed on what it knows.
func (s *Server) keep(r report) bool {
	s.relay.mu.Lock()
	defer s.relay.mu.Unlock()
	if s.relay.passesOn {
		return false
	}
	if r.Connections != nil {
		s.relay.connections[r.PID] = *r.Connections
	}
	s.history.change(func(m *memory) {
		if r.Counters != nil {
			m.counters.add(*r.Counters)
		}
		m.counters.ConnectionsCut += r.Cut
	})
	return true
}

// passOn tells the successor what this process knows.
func (s *Server) passOn(self generation) {
	s.relay.mu.Lock()
	s.relay.passesOn = true
	counters, connections := s.Counters(), maps.Clone(s.relay.connections)
	s.relay.mu.Unlock()
	s.report(report{PID: self.PID, Counters: &counters})
	for pid, n := range connections {
		s.report(report{PID: pid, Connections: &n})
	}
}

// follow keeps the links to those that come after this process, until Close.
func (s *Server) follow() {
	defer close(s.relay.left)
	for {
		l, err := s.relay.meeting.Accept(context.Background())
		if err != nil {
			return
		}
		s.relay.add(l)
		go func() {
			receive(l, func([]byte) {}) // nothing, in this version
			s.relay.drop(l)
		}()
	}
}

func (r *relay) add(l *link.Link) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.newer = append(r.newer, l)
	close(r.came)
	r.came = make(chan struct{})
}

// oldest returns a link to the oldest process that came after this one or, if there is
// none, what will be closed when there is.
func (r *relay) oldest() (l *link.Link, came <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.newer) == 0 {
		return nil, r.came
	}
	return r.newer[0], nil
}

func (r *relay) drop(l *link.Link) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l.Close()
	r.newer = slices.DeleteFunc(r.newer, func(other *link.Link) bool { return other == l })
}

// connectionsOf returns what a process that drains has reported last, or nil.
func (s *Server) connectionsOf(pid int) *int {
	s.relay.mu.Lock()
	defer s.relay.mu.Unlock()
	n, ok := s.relay.connections[pid]
	if !ok {
		return nil
	}
	return &n
}

// tellDrain tells how the drain goes on, until Close, and then how it has ended.
func (s *Server) tellDrain() {
	self, _ := s.generations()
	if s.upg.Replaced() {
		s.passOn(self)
	}
	if s.opts.Connections != nil {
		s.tellConnections(self)
	}
	<-s.closing
	if s.opts.Cut != nil {
		s.report(report{PID: self.PID, Cut: s.opts.Cut()})
	}
}

// tellConnections tells how many connections are left each time that they have changed.
func (s *Server) tellConnections(self generation) {
	tick := time.NewTicker(drainInterval)
	defer tick.Stop()
	for told := -1; ; {
		if n := s.opts.Connections(); n != told {
			told = n
			event.Publish(nil, slog.LevelInfo, event.Draining,
				slog.Int("pid", self.PID), slog.Int("generation", self.Number), slog.Int("connections", n))
			s.report(report{PID: self.PID, Connections: &n})
		}
		select {
		case <-tick.C:
		case <-s.closing:
			return
		}
	}
}

func (r *relay) dropAll() {
	for l, _ := r.oldest(); l != nil; l, _ = r.oldest() {
		r.drop(l)
	}
}

// report sends r to a process that came after this one, if there is one that listens.
func (s *Server) report(r report) {
	if s.relay.meeting == nil || !s.upg.Replaced() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), sendTimeout)
	defer cancel()
	for {
		l, came := s.relay.oldest()
		if l != nil {
			if err := l.Send(ctx, encode(r)); err == nil || ctx.Err() != nil {
				return
			}
			s.relay.drop(l) // of a child that had failed, or one that has drained
			continue
		}
		select {
		case <-came:
		case <-s.relay.left:
			return
		case <-ctx.Done():
			return
		}
	}
}
