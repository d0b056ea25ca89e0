//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"example.com/tableflip/internal/load"
)

// recorder owns the counts. All methods are safe for concurrent use.
type recorder struct {
	grace time.Duration // the server's idle grace

	mu       sync.Mutex
	kinds    map[string]*counts
	failures []failure
	crashes  []window
	stalls   []window
	phase    phase
}

// phase says whether the server is being upgraded at present.
type phase int

const (
	upgraded phase = iota
	control
)

// counts is what is known of one kind of client.
type counts struct {
	sent, answered int
	versions       map[int]int
	latency        [2]histogram // by phase
}

// failure is an exchange that failed.
type failure struct {
	load.Exchange
	unpromised string // why nothing was promised, if so
}

// window is the time from when a process is killed until another serves in its place.
type window struct {
	from, to time.Time

	// dead is when the killed process cannot have begun anything any more, if another
	// process had its sockets; zero if these were lost with it.
	dead time.Time
}

// excuses reports whether the failed exchange was one that the killed process had begun,
// or one that waited in a socket that was lost.
func (w window) excuses(f failure) bool {
	switch {
	case f.Began.After(w.to.Add(settling)) || f.Ended.Before(w.from):
		return false
	case w.dead.IsZero():
		return true
	case errors.Is(f.Err, syscall.ECONNREFUSED) || errors.Is(f.Err, syscall.ENOENT):
		return false
	}
	isNewConnection := f.Idle == 0
	return !isNewConnection || f.Began.Before(w.dead)
}

// settling is how long after a crash its consequences may show, because clients wait for
// an answer that will never come.
const settling = 500 * time.Millisecond

func newRecorder(grace time.Duration) *recorder {
	return &recorder{grace: grace, kinds: make(map[string]*counts)}
}

func (r *recorder) add(e load.Exchange) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.kinds[e.Kind]
	if k == nil {
		k = &counts{versions: make(map[int]int)}
		r.kinds[e.Kind] = k
	}
	k.sent++
	if e.Err != nil {
		f := failure{Exchange: e}
		// The request must arrive before the grace is over. That it was sent is not enough.
		if e.Idle > r.grace*8/10 {
			f.unpromised = fmt.Sprintf("idle for %.1f graces", float64(e.Idle)/float64(r.grace))
		}
		r.failures = append(r.failures, f)
		return
	}
	k.answered++
	k.versions[e.By]++
	k.latency[r.phase].add(e.Latency)
}

func (r *recorder) enter(p phase) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.phase = p
}

func (r *recorder) crashed(w window) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.crashes = append(r.crashes, w)
}

// A client whose requests have a deadline is promised nothing while the machine, or one of
// the servers, stands still.

// stallLimit is how late a timer may be on a machine that does not stand still.
const stallLimit = deadline / 8

// watchStalls notes when nobody who is due gets a processor.
func (r *recorder) watchStalls(ctx context.Context) {
	const interval = 5 * time.Millisecond
	for began := time.Now(); load.Sleep(ctx, interval); began = time.Now() {
		if time.Since(began) > interval+stallLimit {
			r.stalled(began, time.Now())
		}
	}
}

func (r *recorder) stalled(from, to time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stalls = append(r.stalls, window{from: from, to: to})
}

// missedDeadline reports whether a failure is of a deadline, in a stall.
func (r *recorder) missedDeadline(f failure) bool {
	isDeadline := errors.Is(f.Err, context.DeadlineExceeded) || status.Code(f.Err) == codes.DeadlineExceeded
	if !isDeadline || f.Ended.Sub(f.Began) >= load.Limit {
		return false
	}
	return slices.ContainsFunc(r.stalls, func(w window) bool { return f.Ended.After(w.from) && f.Began.Before(w.to) })
}

// verdict says whose fault a failure is.
type verdict int

const (
	lost verdict = iota
	crash
	unpromised
)

// judge is called when the run is over.
func (r *recorder) judge(f failure) verdict {
	for _, w := range r.crashes {
		if w.excuses(f) {
			return crash
		}
	}
	if f.unpromised != "" || r.missedDeadline(f) {
		return unpromised
	}
	return lost
}
