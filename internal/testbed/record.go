//go:build linux

package main

import (
	"errors"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"example.com/tableflip/internal/load"
)

// recorder owns the counts. All methods are safe for concurrent use.
type recorder struct {
	grace    time.Duration // the server's idle grace
	deadline time.Duration // of the clients whose requests have one

	mu       sync.Mutex
	kinds    map[string]*counts
	failures []failure
	crashes  []window
	stalls   []stall // for want of a processor
	stops    []stall // by the test-bed's SIGSTOP
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
	began := f.Began
	if isStored(f.Err) {
		began = began.Add(-settling)
	}
	return !isNewConnection || began.Before(w.dead)
}

// isStored reports whether a call of gRPC has failed because of a connection that broke before
// it was used, and perhaps before the call began: until there is another, the client returns
// the error of the last attempt.
func isStored(err error) bool {
	return status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "connection error: ") &&
		!strings.Contains(err.Error(), syscall.ECONNREFUSED.Error())
}

// settling is how long after a crash its consequences may show, because clients wait for
// an answer that will never come.
const settling = 500 * time.Millisecond

func newRecorder(grace, deadline time.Duration) *recorder {
	return &recorder{grace: grace, deadline: deadline, kinds: make(map[string]*counts)}
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
		if isUnsent(e) {
			f.unpromised = "net/http has not sent it"
		}
		r.failures = append(r.failures, f)
		return
	}
	k.answered++
	k.versions[e.By]++
	k.latency[r.phase].add(e.Latency)
}

// isUnsent reports whether net/http has failed a request over HTTP/2 of which it had sent
// nothing, because it could not repeat it on another connection: see "What remains" of
// package httpdrain. It exports no such error.
func isUnsent(e load.Exchange) bool {
	return strings.HasSuffix(e.Kind, oneShot) && strings.HasSuffix(e.Err.Error(), "net/http: cannot rewind body after connection loss")
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
	// The request must arrive before the grace is over. That it was sent is not enough.
	if f.unpromised != "" || r.silence(f) > r.grace*8/10 || isDeadline(f) && r.stoodStill(f) >= r.deadline/2 {
		return unpromised
	}
	return lost
}
