//go:build linux

package main

import (
	"errors"
	"testing"
	"time"

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
		want         verdict
	}{
		{"before the crash", 1, 2, 0, lost},
		{"over the crash", 9, 10.5, 0, crash},
		{"right after the crash", 11.2, 12, 0, crash},
		{"well after the crash", 12, 13, 0, lost},
		{"after a short pause", 1, 2, grace / 2, lost},
		{"after a pause that the grace hardly covers", 1, 2, grace * 9 / 10, unpromised},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRecorder(grace)
			r.crashed(window{at(10), at(11)})
			r.add(load.Exchange{Kind: "kind", Began: at(test.began), Ended: at(test.ended), Idle: test.idle, Err: errors.New("lost")})
			if k := r.kinds["kind"]; k.sent != 1 || k.answered != 0 || len(r.failures) != 1 {
				t.Fatalf("got %+v and %d failures, want one", k, len(r.failures))
			}
			if got := r.judge(r.failures[0]); got != test.want {
				t.Errorf("got verdict %d, want %d", got, test.want)
			}
		})
	}
}
