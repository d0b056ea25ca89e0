package main

import (
	"strings"
	"testing"
	"time"
)

func TestReport(t *testing.T) {
	at := func(seconds int) time.Time { return time.Unix(int64(seconds), 0) }
	generations := []generation{
		{identity{"v1", 10}, at(0), at(0), 0, at(0)},
		{identity{"v2", 20}, at(10), at(12), 1234567 * time.Microsecond, at(14)},
		{identity{"v1", 30}, at(20), at(22), 20 * time.Millisecond, at(24)},
		{identity: identity{"v2", 0}, asked: at(30)}, // was never finished
	}
	lost := func(began, ended int, previous identity) failure {
		return failure{"GET", "EOF", at(began), at(ended), previous != identity{}, previous}
	}
	total := tally{
		served: map[identity]int{{"v1", 10}: 100, {"v2", 20}: 200, {"v1", 30}: 300},
		failures: []failure{
			lost(1, 2, identity{}),
			lost(11, 11, identity{}),
			lost(13, 13, identity{}),
			lost(13, 16, identity{"v2", 20}),
			lost(23, 23, identity{"v2", 20}),
			lost(25, 26, identity{"v2", 20}),
			lost(31, 31, identity{}),
		},
	}
	var out strings.Builder
	err := report(&out, generations, total)
	if err == nil || err.Error() != "7 of 607 requests failed" {
		t.Error(err)
	}
	if got, want := out.String(), `
   generation   version   PID   Upgrade took   requests   failed
            1        v1    10              -        100        3
            2        v2    20        1.2346s        200        3
            3        v1    30           20ms        300        1
            4        v2     -     unfinished          0        0

2 upgrades, 600 requests served, 7 failed
       3 × GET, not the first on its connection, by the drain of the old process: EOF
       2 × GET, while a new process started: EOF
       1 × GET, between upgrades: EOF
       1 × GET, by the drain of the old process: EOF
`; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

func TestReportWithoutFailures(t *testing.T) {
	generations := []generation{{identity: identity{"v1", 10}}}
	var out strings.Builder
	if err := report(&out, generations, tally{served: map[identity]int{{"v1", 10}: 5}}); err != nil {
		t.Error(err)
	}
	if want := "0 upgrades, 5 requests served, 0 failed\n"; !strings.HasSuffix(out.String(), want) {
		t.Error(out.String())
	}
}

func TestReportOfStrangers(t *testing.T) {
	generations := []generation{{identity: identity{"v1", 10}}}
	err := report(new(strings.Builder), generations, tally{served: map[identity]int{{"v1", 10}: 5, {"v2", 10}: 3}})
	if err == nil || !strings.Contains(err.Error(), "3 requests were answered by v2 with PID 10") {
		t.Error(err)
	}
}
