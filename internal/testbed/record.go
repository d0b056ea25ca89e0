//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/testbed/wire"
)

// recorder owns the counts. All methods are safe for concurrent use.
type recorder struct {
	grace time.Duration // the server's idle grace

	mu       sync.Mutex
	kinds    map[string]*counts
	failures []failure
	crashes  []window
	stalls   []window
	faults   []window
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
		switch {
		case r.silence(e) > r.grace*8/10:
			f.unpromised = fmt.Sprintf("idle for %.1f graces", float64(r.silence(e))/float64(r.grace))
		case isUnsent(e):
			f.unpromised = "net/http has not sent it"
		}
		r.failures = append(r.failures, f)
		return
	}
	k.answered++
	k.versions[e.By]++
	k.latency[r.phase].add(e.Latency)
}

// silence returns for how long the server may have heard nothing on a connection, if nothing
// stands still.
func (r *recorder) silence(e load.Exchange) time.Duration {
	switch {
	case e.Kind == slow:
		return r.grace / 2
	case strings.HasPrefix(e.Kind, slowLinked):
		return e.Idle + slowLink.RoundTrip // its last answer to the client, and this request to it
	}
	return e.Idle
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

// What is promised of time holds while nothing stands still: not in a fault, and not while
// the machine has no processor for the clients or the server.

// stallLimit is how late a timer and a datagram may be on a machine that does not stand
// still.
const stallLimit = deadline / 8

// watchStalls looks how long the server takes to answer a datagram. It has no part in any
// drain.
func (r *recorder) watchStalls(ctx context.Context, udp string) {
	const interval = 5 * time.Millisecond
	content, answer := wire.Content(0, 16), make([]byte, 2<<10)
	conn, err := net.Dial("udp", udp)
	if err != nil {
		return
	}
	defer conn.Close()
	for began := time.Now(); load.Sleep(ctx, interval); began = time.Now() {
		conn.SetDeadline(time.Now().Add(datagramLimit))
		conn.Write(content)
		conn.Read(answer)
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

// disturbed notes that one of the servers may have stood still.
func (r *recorder) disturbed(from, to time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = append(r.faults, window{from: from, to: to})
}

// standstill reports whether a failure is of a deadline, in a stall or a fault, or of a client
// from which the server may have heard nothing for about its grace, because of stalls.
func (r *recorder) standstill(f failure) bool {
	took := f.Ended.Sub(f.Began)
	isDeadline := errors.Is(f.Err, context.DeadlineExceeded) || status.Code(f.Err) == codes.DeadlineExceeded
	isDeadline = isDeadline && took < load.Limit
	overlaps := func(w window) bool { return f.Ended.After(w.from) && f.Began.Before(w.to) }
	switch {
	case isDeadline && (slices.ContainsFunc(r.stalls, overlaps) || slices.ContainsFunc(r.faults, overlaps)):
		return true
	case isDeadline && took > deadline+stallLimit:
		return true // the client itself was late
	}
	stalled := r.stalledIn(f)
	return stalled > 0 && r.silence(f.Exchange)+stalled > r.grace*8/10
}

// stalledIn returns how long the stalls lasted that fall into an exchange that failed, or into the
// pause before it.
func (r *recorder) stalledIn(f failure) (sum time.Duration) {
	for _, w := range r.stalls {
		if f.Ended.After(w.from) && f.Began.Add(-f.Idle).Before(w.to) {
			sum += w.to.Sub(w.from)
		}
	}
	return sum
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
	if f.unpromised != "" || r.standstill(f) {
		return unpromised
	}
	return lost
}
