//go:build linux

package main

import (
	"context"
	"io"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"example.com/tableflip/internal/load"
)

// Only what nobody promised, and what a crash took with it, is not lost.
func TestJudge(t *testing.T) {
	const grace = time.Second
	begin := time.Now()
	at := func(seconds float64) time.Time { return begin.Add(time.Duration(seconds * float64(time.Second))) }
	for _, test := range []struct {
		name         string
		began, ended float64
		idle         time.Duration
		err          error
		want         verdict
	}{
		{"before the crash", 1, 2, 0, io.EOF, lost},
		{"over the crash", 9, 10.5, 0, io.EOF, crash},
		{"right after the crash", 11.2, 12, 0, io.EOF, crash},
		{"well after the crash", 12, 13, 0, io.EOF, lost},
		{"refused in the crash", 10.5, 10.5, 0, syscall.ECONNREFUSED, crash},
		{"before a successor takes over", 19, 20.5, 0, io.EOF, crash},
		{"begun when only the successor lived", 20.5, 20.6, 0, io.EOF, lost},
		{"on a connection of the killed process", 20.5, 20.6, grace / 2, io.EOF, crash},
		{"refused in spite of a successor", 19, 20.1, 0, syscall.ECONNREFUSED, lost},
		{"after a short pause", 1, 2, grace / 2, io.EOF, lost},
		{"after a pause that the grace hardly covers", 1, 2, grace * 9 / 10, io.EOF, unpromised},
		{"a deadline missed without a reason", 1, 1.2, 0, context.DeadlineExceeded, lost},
		{"a deadline missed in a stall", 30, 30.2, 0, context.DeadlineExceeded, unpromised},
		{"a call's deadline missed in a stall", 30, 30.2, 0, status.Error(codes.DeadlineExceeded, ""), unpromised},
		{"an answer that never came, for a stall", 30, 50, 0, context.DeadlineExceeded, lost},
		{"another failure in a stall", 30, 30.2, 0, io.EOF, lost},
		{"another failure in a long stall", 60.5, 60.6, 0, io.EOF, unpromised},
		{"in a stall, after a pause with which it lasts for a grace", 40, 40.2, grace / 2, io.EOF, unpromised},
		{"in a stall, after a short pause", 40, 40.2, grace / 4, io.EOF, lost},
		{"after a stall, and a pause as long as it would have to be", 41, 41.2, grace / 2, io.EOF, lost},
		{"a deadline that the client noticed late", 1, 1.3, 0, context.DeadlineExceeded, unpromised},
		{"the error of an attempt before the successor", 20.5, 20.6, 0, status.Error(codes.Unavailable, "connection error: broken pipe"), crash},
		{"the error of no attempt before the successor", 20.9, 20.95, 0, status.Error(codes.Unavailable, "connection error: broken pipe"), lost},
		{"refused by a successor", 20.5, 20.6, 0, status.Error(codes.Unavailable, "connection error: connection refused"), lost},
		{"a deadline missed in a fault", 70, 70.2, 0, context.DeadlineExceeded, unpromised},
		{"another failure in a fault", 70, 70.2, 0, io.EOF, lost},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRecorder(grace)
			r.crashed(window{from: at(10), to: at(11)})
			r.crashed(window{from: at(20), dead: at(20.2), to: at(21)})
			r.stalled(at(30.1), at(30.3))
			r.stalled(at(39.6), at(39.8))
			r.stalled(at(40), at(40.15))
			r.stalled(at(60), at(60.9))
			r.disturbed(at(70), at(75))
			r.add(load.Exchange{Kind: "kind", Began: at(test.began), Ended: at(test.ended), Idle: test.idle, Err: test.err})
			if k := r.kinds["kind"]; k.sent != 1 || k.answered != 0 || len(r.failures) != 1 {
				t.Fatalf("got %+v and %d failures, want one", k, len(r.failures))
			}
			if got := r.judge(r.failures[0]); got != test.want {
				t.Errorf("got verdict %d, want %d", got, test.want)
			}
		})
	}
}

// The server hears a request over a slow link later than it was sent, and a slow sender makes
// pauses of its own.
func TestSilence(t *testing.T) {
	const grace = time.Second
	r := newRecorder(grace)
	for kind, want := range map[string]time.Duration{
		"new GET":            300 * time.Millisecond,
		slow:                 500 * time.Millisecond,
		slowLinked + " POST": 350 * time.Millisecond,
	} {
		if got := r.silence(load.Exchange{Kind: kind, Idle: 300 * time.Millisecond}); got != want {
			t.Errorf("%s: got %v, want %v", kind, got, want)
		}
	}
}
