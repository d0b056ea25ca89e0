// Package event publishes the steps of this process's upgrades: to the program's log,
// and to whoever subscribes. A process has one Upgrader at a time, so the package keeps
// one set of subscribers.
package event

import (
	"context"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"
)

// The names of events. The package documentation of tableflip says when each happens,
// and which attributes it has.
const (
	Started   = "started"
	Here      = "here"
	Ready     = "ready"
	OnTrial   = "on trial"
	Committed = "committed"
	Failed    = "failed"
	Refused   = "refused"
	Rehearsed = "rehearsed"
	InCharge  = "in charge"
	Draining  = "draining"
	Ended     = "ended"
)

// An Event is a step of an upgrade.
type Event struct {
	Time  time.Time
	Level slog.Level
	Name  string
	Attrs []slog.Attr // not to be changed: all subscribers share them
}

// backlog is how many events a subscriber may be behind. An upgrade has six.
const backlog = 64

var (
	mu          sync.Mutex // Under it nothing blocks.
	subscribers = make(map[chan Event]struct{})
)

// Publish hands an event to all subscribers, and logs it as "tableflip: NAME" unless
// logger is nil. In the log, what describes the process is in the group "process", because
// services put a pid and a version of their own on their loggers. Publish never waits for a subscriber. It waits for the logger's handler,
// so the caller must hold nothing that a handler could wait for.
func Publish(logger *slog.Logger, level slog.Level, name string, attrs ...slog.Attr) {
	deliver(Event{time.Now(), level, name, attrs})
	if logger != nil {
		logger.LogAttrs(context.Background(), level, "tableflip: "+name, grouped(attrs)...)
	}
}

func grouped(attrs []slog.Attr) []slog.Attr {
	var process, others []slog.Attr
	for _, a := range attrs {
		switch a.Key {
		case "pid", "generation", "version", "revision":
			process = append(process, a)
		default:
			others = append(others, a)
		}
	}
	// A handler leaves out a group that is empty.
	return append([]slog.Attr{slog.GroupAttrs("process", process...)}, others...)
}

func deliver(e Event) {
	mu.Lock()
	defer mu.Unlock()
	for events := range subscribers {
		select {
		case events <- e:
		default: // a subscriber that is stuck misses events, and holds nothing up
		}
	}
}

// Subscribe returns a channel that receives what is published from now on. A
// subscriber that is 64 events behind misses those that follow. Call cancel, once or
// more, to end the subscription: it closes the channel.
func Subscribe() (events <-chan Event, cancel func()) {
	c := make(chan Event, backlog)
	mu.Lock()
	defer mu.Unlock()
	subscribers[c] = struct{}{}
	return c, func() {
		mu.Lock()
		defer mu.Unlock()
		if _, ok := subscribers[c]; ok {
			delete(subscribers, c)
			close(c)
		}
	}
}

// Build returns the attributes "version" and "revision": the version of the program's
// main module, and the commit that the program was built from, as far as the go command
// recorded them.
var Build = sync.OnceValue(func() (attrs []slog.Attr) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return nil
	}
	if info.Main.Version != "" {
		attrs = append(attrs, slog.String("version", info.Main.Version))
	}
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" {
			attrs = append(attrs, slog.String("revision", setting.Value))
		}
	}
	return attrs
})
