//go:build linux

package main

import (
	"context"
	"io"
	"slices"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/testbed/wire"
)

// Only what nobody promised, and what a crash took with it, is not lost.
func TestJudge(t *testing.T) {
	const grace = time.Second
	begin := time.Now()
	seconds := func(n float64) time.Duration { return time.Duration(n * float64(time.Second)) }
	at := func(n float64) time.Time { return begin.Add(seconds(n)) }
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
		{"a deadline missed when a stall had ended", 30.15, 30.35, 0, context.DeadlineExceeded, lost},
		{"a deadline missed in a stall that was too short", 50, 50.2, 0, context.DeadlineExceeded, lost},
		{"another failure in a stall", 30, 30.2, 0, io.EOF, lost},
		{"on a new connection at the end of a long stall", 60.5, 60.6, 0, io.EOF, lost},
		{"in a stall as long as the grace", 59.9, 61, 0, io.EOF, unpromised},
		{"after a pause with a stall in it", 40, 40.02, grace * 7 / 10, io.EOF, lost},
		{"in a stall, after a pause with which it lasts for a grace", 40, 40.2, grace * 7 / 10, io.EOF, unpromised},
		{"in a stall, after a short pause", 40, 40.2, grace / 2, io.EOF, lost},
		{"after a pause that a stall had delayed", 46.7, 46.72, grace / 2, io.EOF, unpromised},
		{"a deadline that the client noticed late", 1, 1.3, 0, context.DeadlineExceeded, lost},
		{"the error of an attempt before the successor", 20.5, 20.6, 0, status.Error(codes.Unavailable, "connection error: broken pipe"), crash},
		{"the error of no attempt before the successor", 20.9, 20.95, 0, status.Error(codes.Unavailable, "connection error: broken pipe"), lost},
		{"refused by a successor", 20.5, 20.6, 0, status.Error(codes.Unavailable, "connection error: connection refused"), lost},
		{"a deadline missed in a suspension", 74.85, 75.05, 0, context.DeadlineExceeded, unpromised},
		{"a deadline missed after a suspension", 74.95, 75.15, 0, context.DeadlineExceeded, lost},
		{"another failure in a suspension", 70, 70.2, 0, io.EOF, lost},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRecorder(grace, 200*time.Millisecond)
			r.crashed(window{from: at(10), to: at(11)})
			r.crashed(window{from: at(20), dead: at(20.2), to: at(21)})
			r.stalled(stall{at(30.0), at(30.2), seconds(0.12)})
			r.stalled(stall{at(39.6), at(39.8), seconds(0.2)})
			r.stalled(stall{at(40), at(40.2), seconds(0.15)})
			r.stalled(stall{at(45.8), at(46.3), seconds(0.35)})
			r.stalled(stall{at(50), at(50.2), seconds(0.08)})
			r.stalled(stall{at(60), at(60.9), seconds(0.9)})
			r.stopped(at(70), at(75))
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
	r := newRecorder(grace, 200*time.Millisecond)
	for _, test := range []struct {
		kind       string
		idle, want time.Duration
	}{
		{"new GET", 300 * time.Millisecond, 300 * time.Millisecond},
		{slow, 0, 500 * time.Millisecond},
		{slowLinked + " POST", 300 * time.Millisecond, 350 * time.Millisecond},
	} {
		if got := r.silence(failure{Exchange: load.Exchange{Kind: test.kind, Idle: test.idle}}); got != test.want {
			t.Errorf("%s: got %v, want %v", test.kind, got, test.want)
		}
	}
}

// On a machine that stands still, the old process may find an acknowledgement after all.
func TestLateAcknowledgement(t *testing.T) {
	b := &bed{record: newRecorder(time.Second, time.Second)}
	b.acknowledgeTimeout = time.Second
	f := fault{injected: wire.Fault{Action: wire.Suspend, Victim: wire.Child, Step: step.VerdictReceived.String()}, isLong: true}
	f.length = b.acknowledgeTimeout + 200*time.Millisecond
	r := &row{began: time.Now().Add(-time.Minute), fault: f}
	cancelled := &row{began: r.began, fault: f}
	cancelled.fault.isCancelled = true
	stalled := func(seconds int, length time.Duration) {
		from := r.began.Add(time.Duration(seconds) * time.Second)
		b.record.stalled(stall{from, from.Add(length), length})
	}
	stalled(-2, time.Second)
	stalled(1, 90*time.Millisecond)
	if got := b.outcomes(r); slices.Contains(got, succeeded) {
		t.Errorf("in a stall that is too short, the outcome may be one of %v", got)
	}
	stalled(2, 90*time.Millisecond)
	if got := b.outcomes(r); !slices.Contains(got, succeeded) || !slices.Contains(got, refused) {
		t.Errorf("in stalls, the outcome must be one of %v", got)
	}
	if got := b.outcomes(cancelled); slices.Contains(got, succeeded) {
		t.Errorf("in stalls, the outcome of a cancelled upgrade may be one of %v", got)
	}
}

// Only what stops a process that has requests to answer excuses that they are late.
func TestStopsService(t *testing.T) {
	suspend := func(victim string, s step.Step, hasTrial bool) fault {
		return fault{injected: wire.Fault{Action: wire.Suspend, Victim: victim, Step: s.String()}, hasTrial: hasTrial}
	}
	for _, test := range []struct {
		fault fault
		want  bool
	}{
		{fault{environment: parentSuspended}, true},
		{suspend(wire.Parent, step.HereSaid, false), true},
		{suspend(wire.Child, step.HereSaid, false), false},
		{suspend(wire.Child, step.VerdictReceived, false), false},
		{suspend(wire.Child, step.VerdictReceived, true), true},
		{suspend(wire.Child, step.HereSaid, true), false},
		{suspend(wire.Child, step.AfterCommit, false), true},
		{suspend(wire.Child, step.Acknowledged, false), true},
	} {
		if got := test.fault.stopsService(); got != test.want {
			t.Errorf("%v, trial %t: got %t, want %t", test.fault, test.fault.hasTrial, got, test.want)
		}
	}
}
