package control

import (
	"log/slog"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"example.com/tableflip/internal/event"
)

// Whoever asks hears of all that was published before, whether that was noted already or
// not, and whether the history has been closed or not.
func TestHistoryIsCurrent(t *testing.T) {
	publish := func() { event.Publish(nil, slog.LevelError, event.Failed, slog.String("cause", "test")) }
	for i := range 64 { // the runtime chooses what is noted first
		synctest.Test(t, func(t *testing.T) {
			h := remember(1)
			busy := make(chan struct{})
			go h.change(func(*memory) { <-busy })
			synctest.Wait()
			publish()
			publish()
			if i%2 == 0 {
				h.close()
			}
			asked := make(chan memory)
			go func() { asked <- h.recall() }()
			synctest.Wait()
			close(busy)
			if got := (<-asked).counters.Failures["test"]; got != 2 {
				t.Errorf("%d of 2 are counted", got)
			}
			h.close()
			<-h.ended
		})
	}
}

// What is remembered is not its readers' to change.
func TestHistoryIsCloned(t *testing.T) {
	h := remember(1)
	h.recall().counters.Failures["test"] = 1
	h.close()
	<-h.ended
	h.recall().counters.Failures["test"] = 1
	if got := h.recall().counters.Failures; len(got) > 0 {
		t.Errorf("got %v", got)
	}
}

func TestHistoryNotes(t *testing.T) {
	m := memory{self: 3, counters: Counters{Failures: map[string]int{}}}
	note := func(name string, attrs ...slog.Attr) {
		m.note(event.Event{Time: time.Now(), Name: name, Attrs: attrs})
	}
	wantLast := func(want string) {
		t.Helper()
		if want == "" && m.last != nil || want != "" && (m.last == nil || !strings.HasPrefix(m.last.String(), want)) {
			t.Errorf("the last upgrade %v, want %q", m.last, want)
		}
	}
	note(event.InCharge, slog.Int("pid", os.Getpid())) // the first generation
	wantLast("")
	note(event.Committed, slog.Int("pid", 11), slog.Bool("rehearsal", true))
	wantLast("")
	note(event.Committed, slog.Int("generation", 4), slog.Int("pid", 11))
	wantLast("put process 11 in charge at 20")
	note(event.Failed, slog.Int("pid", 12), slog.String("cause", "child"), slog.String("error", "exit status 7"))
	wantLast("failed: exit status 7 at 20")
	note(event.InCharge)
	if m.last == nil || m.last.PID != os.Getpid() {
		t.Errorf("the last upgrade %v, want it of this process", m.last)
	}
	for generation := range 5 {
		note(event.Ended, slog.Int("generation", generation), slog.Duration("took", 1500*time.Millisecond))
		note(event.Ended, slog.Int("generation", generation))
	}
	wantCounters(t, m.counters, Counters{1, map[string]int{"child": 1}, 3, 4.5, 0})

	m.counters.add(Counters{7, map[string]int{"child": 1, "pid file": 2}, 10, 0.5, 6})
	m.counters.add(Counters{ConnectionsCut: 2})
	wantCounters(t, m.counters, Counters{1, map[string]int{"child": 2, "pid file": 2}, 13, 5, 8})
}

func wantCounters(t *testing.T, got, want Counters) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
