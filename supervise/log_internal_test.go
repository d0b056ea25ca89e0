//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"testing"
)

// A testHandler keeps what it is told.
type testHandler struct {
	slog.Handler
	entered chan struct{} // receives at each record, if it is not nil
	leave   chan struct{} // is received from then
	told    []string
}

func (h *testHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo
}

func (h *testHandler) Handle(_ context.Context, r slog.Record) error {
	if h.entered != nil {
		h.entered <- struct{}{}
		<-h.leave
	}
	text := r.Message
	r.Attrs(func(a slog.Attr) bool { text += fmt.Sprint(" ", a); return true })
	h.told = append(h.told, text)
	return nil
}

// The last records come right before the end.
func TestJournalWritesAll(t *testing.T) {
	for range 1000 {
		h := &testHandler{}
		j := openJournal(h)
		j.log(slog.LevelDebug, "not enabled")
		j.info("a")
		j.info("b", "x", 1)
		j.close()
		<-j.closed
		if want := []string{"a", "b x=1"}; !slices.Equal(h.told, want) {
			t.Fatalf("written %q, want %q", h.told, want)
		}
	}
}

func TestJournalCountsTheMissing(t *testing.T) {
	h := &testHandler{entered: make(chan struct{}), leave: make(chan struct{})}
	j := openJournal(h)
	j.info("first")
	<-h.entered
	for range cap(j.records) + 3 {
		j.info("more")
	}
	go func() {
		for range h.entered {
			h.leave <- struct{}{}
		}
	}()
	h.leave <- struct{}{}
	j.close()
	<-j.closed
	close(h.entered)
	if missing := "the log was not read: records are missing count=3"; len(h.told) != 2+cap(j.records) || h.told[1] != missing {
		t.Errorf("written %d records, the second is %q, want %q", len(h.told), h.told[1], missing)
	}
}
