package logqueue

import (
	"bytes"
	"context"
	"log/slog"
	"testing"
)

func TestQueue(t *testing.T) {
	var log bytes.Buffer
	want := func(when, text string) {
		t.Helper()
		if log.String() != text {
			t.Errorf("%s: the log says %q, want %q", when, log.String(), text)
		}
	}
	options := slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}
	var queue Queue
	logger := queue.Logger(slog.New(slog.NewTextHandler(&log, &options)))

	logger.Warn("a")
	want("nothing is held", "level=WARN msg=a\n")
	log.Reset()

	first, second := queue.Hold(), queue.Hold()
	logger.With("x", 1).WithGroup("g").Warn("b", "y", 2)
	logger.Debug("not enabled")
	want("held twice", "")
	first()
	logger.Info("c")
	want("held once", "")
	second()
	want("released", "level=WARN msg=b x=1 g.y=2\nlevel=INFO msg=c\n")
	log.Reset()

	logger.Warn("d")
	want("nothing is held again", "level=WARN msg=d\n")
}

func TestQueueNoLogger(t *testing.T) {
	var queue Queue
	if queue.Logger(nil) != nil {
		t.Error("there is a logger")
	}
	queue.Hold()()
}

// A handler's Enabled is the program's code as much as its Handle.
func TestQueueAsksNothing(t *testing.T) {
	var queue Queue
	asked := 0
	logger := queue.Logger(slog.New(countingHandler{slog.DiscardHandler, &asked}))
	release := queue.Hold()
	logger.Warn("a")
	if asked != 0 {
		t.Error("the handler was asked while records are held")
	}
	release()
	if asked != 1 {
		t.Errorf("the handler was asked %d times about one record", asked)
	}
}

type countingHandler struct {
	slog.Handler
	asked *int
}

func (h countingHandler) Enabled(context.Context, slog.Level) bool {
	*h.asked++
	return false
}
