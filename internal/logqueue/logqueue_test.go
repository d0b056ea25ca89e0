package logqueue

import (
	"bytes"
	"context"
	"log/slog"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
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

// What is logged while held records are handled does not overtake them, and what a handler's
// call of a method logs is handled before that call returns.
func TestQueueOrder(t *testing.T) {
	var queue Queue
	var got []string
	var logger *slog.Logger
	logger = queue.Logger(slog.New(handlerFunc(func(message string) {
		got = append(got, message)
		if message == "first" {
			logged := make(chan struct{})
			go func() { // as nobody does who waits for a method
				defer close(logged)
				logger.Info("third")
			}()
			<-logged
		}
		if message == "third" {
			release := queue.Hold()
			logger.Info("fourth")
			release()
			got = append(got, "called")
		}
	})))
	release := queue.Hold()
	logger.Info("first")
	logger.Info("second")
	release()
	logger.Info("fifth")
	if want := []string{"first", "second", "third", "fourth", "called", "fifth"}; !slices.Equal(got, want) {
		t.Errorf("the log says %q, want %q", got, want)
	}
}

// A handler that panics takes the records with it that are held, and no others.
func TestQueuePanics(t *testing.T) {
	var queue Queue
	var got []string
	logger := queue.Logger(slog.New(handlerFunc(func(message string) {
		if message == "first" {
			panic(message)
		}
		got = append(got, message)
	})))
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic did not arrive")
			}
		}()
		defer queue.Hold()()
		logger.Info("first")
		logger.Info("second")
	}()
	logger.Info("third")
	if want := []string{"third"}; !slices.Equal(got, want) {
		t.Errorf("the log says %q, want %q", got, want)
	}
}

type handlerFunc func(message string)

func (f handlerFunc) Enabled(context.Context, slog.Level) bool { return true }

func (f handlerFunc) Handle(_ context.Context, r slog.Record) error {
	f(r.Message)
	return nil
}

func (f handlerFunc) WithAttrs([]slog.Attr) slog.Handler { return f }

func (f handlerFunc) WithGroup(string) slog.Handler { return f }

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

// A handler that is stuck holds up neither a method that pauses nor its return, and what is
// logged then does not overtake what it handles.
func TestQueuePause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var queue Queue
		handles, goOn := make(chan string, 10), make(chan struct{})
		logger := queue.Logger(slog.New(handlerFunc(func(message string) {
			handles <- message
			<-goOn
		})))
		release := queue.Hold()
		logger.Info("first")
		resume := queue.Pause()
		synctest.Wait()
		go logger.Info("second")
		synctest.Wait()
		resume()
		logger.Info("third")
		release()
		synctest.Wait()
		if len(handles) != 1 {
			t.Errorf("%d records are being handled, want 1", len(handles))
		}
		close(goOn)
		synctest.Wait()
		logger.Info("last")
		close(handles)
		var got []string
		for message := range handles {
			got = append(got, message)
		}
		if !slices.Equal(got, []string{"first", "second", "third", "last"}) {
			t.Errorf("the order is %q", got)
		}
	})
}

// Nor does it overtake what a pause has not begun to handle.
func TestQueuePauseBegins(t *testing.T) {
	// The goroutine of Pause cannot run before this one waits.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	var queue Queue
	handles := make(chan string, 2)
	logger := queue.Logger(slog.New(handlerFunc(func(message string) { handles <- message })))
	release := queue.Hold()
	logger.Info("first")
	resume := queue.Pause()
	logger.Info("second")
	if first, second := <-handles, <-handles; first != "first" || second != "second" {
		t.Errorf("the order is %q, %q", first, second)
	}
	resume()
	release()
}
