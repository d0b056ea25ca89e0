//go:build linux

package main

import (
	"context"
	"errors"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/testbed/proc"
)

// This file measures how long the machine stands still, because what is promised of time does
// not hold meanwhile. It asks no server: one that hangs would excuse itself. The kernel tells
// for how long a thread could have run, and got no processor.

// A stall is a wait of this length, somewhere between two times.
type stall struct {
	from, to time.Time
	length   time.Duration
}

// within returns how much of the stalls can have been between two times.
func within(stalls []stall, from, to time.Time) (sum time.Duration) {
	for _, s := range stalls {
		begin, end := s.from, s.to
		if begin.Before(from) {
			begin = from
		}
		if end.After(to) {
			end = to
		}
		sum += max(0, min(s.length, end.Sub(begin)))
	}
	return sum
}

// least is the shortest stall that is noted.
const least = 2 * time.Millisecond

// watchStalls notes how long the threads of the servers, and those of this process, wait for
// a processor, and by how much a timer is late, which is all that shows if the whole machine
// is suspended. A request may have to wait on both sides. It returns when ctx is done.
func (r *recorder) watchStalls(ctx context.Context, servers func() []int) {
	const interval = 20 * time.Millisecond
	waits := proc.NewWaits()
	for began, goesOn := time.Now(), true; goesOn; {
		goesOn = load.Sleep(ctx, interval)
		late := time.Since(began) - interval
		length := max(late, waits.Longest(os.Getpid())) + waits.Longest(servers()...)
		now := time.Now()
		if length >= least {
			r.stalled(stall{began.Add(-length), now, length})
		}
		began = now
	}
}

func (r *recorder) stalled(s stall) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stalls = append(r.stalls, s)
}

// stopped notes that a server that had requests to answer was suspended.
func (r *recorder) stopped(from, to time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stops = append(r.stops, stall{from, to, to.Sub(from)})
}

// stalledSince returns how long the machine has stood still since a time.
func (r *recorder) stalledSince(from time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return within(r.stalls, from, time.Now())
}

// isDeadline reports whether a request has failed because of a deadline of its own.
func isDeadline(f failure) bool {
	missed := errors.Is(f.Err, context.DeadlineExceeded) || status.Code(f.Err) == codes.DeadlineExceeded
	return missed && f.Ended.Sub(f.Began) < load.Limit
}

// stoodStill returns for how much of an exchange the machine, or a server, may have stood
// still.
func (r *recorder) stoodStill(f failure) time.Duration {
	return within(r.stalls, f.Began, f.Ended) + within(r.stops, f.Began, f.Ended)
}

// silence returns for how long a server may have heard nothing on a connection when the
// request came: since it had written the last answer, which the client may have got late, and
// until the request had left, which may have had to wait.
func (r *recorder) silence(f failure) time.Duration {
	left := f.Began.Add(r.grace)
	if f.Ended.Before(left) {
		left = f.Ended
	}
	silent := f.Idle + within(r.stalls, f.Began, left)
	if f.Idle > 0 {
		paused := f.Began.Add(-f.Idle)
		silent += within(r.stalls, paused.Add(-r.grace), paused)
	}
	switch {
	case f.Kind == slow:
		silent += r.grace / 2 // between its pieces
	case strings.HasPrefix(f.Kind, slowLinked):
		silent += slowLink.RoundTrip // its last answer to the client, and this request to it
	}
	return silent
}
