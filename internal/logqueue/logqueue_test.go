package logqueue

import (
	"bytes"
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
