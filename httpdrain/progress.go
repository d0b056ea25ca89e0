package httpdrain

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// This file owns what a drain tells of itself: how much is left, in numbers, in the
// log, and in its error.

// logInterval is how often the progress of a drain is logged.
const logInterval = 5 * time.Second

// Progress is what a server has left to do.
type Progress struct {
	// Connections is the number of connections that are open, except for hijacked
	// ones.
	Connections int

	// Active is how many of them have a request that is being answered.
	Active int

	// Hijacked is the number of hijacked connections that have not been closed.
	// Only those are seen that are TCP or Unix connections, or wrap one and have a
	// method NetConn, as those of crypto/tls do.
	Hijacked int
}

// Progress returns what the server has left to do, before, during and after a
// drain. It looks at every connection.
func (d *Drainer) Progress() Progress {
	p := Progress{Hijacked: d.hijacked.count()}
	d.conns.Range(func(_, value any) bool {
		p.Connections++
		if http.ConnState(value.(*conn).state.Load()) == http.StateActive {
			p.Active++
		}
		return true
	})
	return p
}

// countInUse returns how many connections, and how many of them in the middle of a
// request, would be closed before their time if they were closed now.
func (d *Drainer) countInUse() (connections, active int) {
	d.conns.Range(func(_, value any) bool {
		early, inRequest := value.(*conn).inUse()
		if early {
			connections++
		}
		if inRequest {
			active++
		}
		return true
	})
	return connections, active
}

// logProgress logs that the drain has begun, and how it goes on. It returns what
// logs its end.
func (d *Drainer) logProgress() (stop func()) {
	if d.Logger == nil {
		return func() {}
	}
	log := func(level slog.Level, msg string, args ...any) {
		p := d.Progress()
		args = append([]any{"connections", p.Connections, "active", p.Active, "hijacked", p.Hijacked}, args...)
		d.Logger.Log(context.Background(), level, msg, args...)
	}
	log(slog.LevelInfo, "drain begins")
	ended := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		tick := time.NewTicker(logInterval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				log(slog.LevelInfo, "drain goes on", "since", time.Since(d.began).Round(time.Millisecond))
			case <-ended:
				return
			}
		}
	})
	return func() {
		close(ended)
		wait.Wait()
		took := time.Since(d.began).Round(time.Millisecond)
		if d.err != nil {
			log(slog.LevelWarn, "drain failed", "took", took, "error", d.err)
		} else {
			log(slog.LevelInfo, "drain ends", "took", took)
		}
	}
}

// hijackedConns are connections that the server has given away. Only those are kept
// whose close can be seen.
type hijackedConns struct {
	mu      sync.Mutex
	conns   map[net.Conn]struct{}
	purgeAt int // the number of them at which the closed ones are forgotten
}

func (h *hijackedConns) add(nc net.Conn) {
	if _, ok := bare(nc).(syscall.Conn); !ok {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conns == nil {
		h.conns = make(map[net.Conn]struct{})
	}
	if h.conns[nc] = struct{}{}; len(h.conns) > h.purgeAt {
		h.purge()
		h.purgeAt = 2*len(h.conns) + 100
	}
}

func (h *hijackedConns) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.purge()
	return len(h.conns)
}

func (h *hijackedConns) purge() {
	for nc := range h.conns {
		if isClosed(nc) {
			delete(h.conns, nc)
		}
	}
}

// isClosed reports whether this process has closed nc: then its descriptor cannot be
// used.
func isClosed(nc net.Conn) bool {
	raw, err := bare(nc).(syscall.Conn).SyscallConn()
	return err != nil || raw.Control(func(uintptr) {}) != nil
}

// await returns when all are closed, or ctx ends.
func (h *hijackedConns) await(ctx context.Context) {
	for {
		n := h.count()
		if n == 0 {
			return
		}
		// So that the looks take some percent of a processor at most.
		interval := 50*time.Millisecond + time.Duration(n)*10*time.Microsecond
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return
		}
	}
}

// CutError is returned by Shutdown if its context ended before all connections
// had come to their end.
type CutError struct {
	// Connections is the number of connections that were closed although a
	// request was being answered, or IdleGrace was not over.
	Connections int

	// Active is how many of them had a request that was being answered.
	Active int

	// Hijacked is the number of hijacked connections that are open still, if
	// Drainer.WaitHijacked is set. They have not been closed.
	Hijacked int

	// Cause is context.Cause of the context that ended.
	Cause error
}

func (e *CutError) Error() string {
	noun := "connections"
	if e.Connections == 1 {
		noun = "connection"
	}
	text := fmt.Sprintf("httpdrain: %d %s cut, %d of them with a request in progress", e.Connections, noun, e.Active)
	if e.Hijacked > 0 {
		text += fmt.Sprintf(", %d hijacked left open", e.Hijacked)
	}
	return fmt.Sprintf("%s: %v", text, e.Cause)
}

// Unwrap returns Cause.
func (e *CutError) Unwrap() error { return e.Cause }
