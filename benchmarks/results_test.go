//go:build linux

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// played returns a run of one peer in which what happened is known: a request per
// millisecond, two upgrades, at 1 s and 2 s, the first of which loses two requests, and
// whose old process outlives the next one's.
func played(t *testing.T) *bench {
	t.Helper()
	const ms = time.Millisecond
	tr := &traffic{began: time.Now().Add(-3 * time.Second)}
	tr.processes = []*process{
		{pid: 1, seen: 1 * ms, exit: 2500 * ms},
		{pid: 2, seen: 1010 * ms, exit: 2300 * ms},
		{pid: 3, seen: 2020 * ms},
	}
	for at := time.Duration(0); at < 3*time.Second; at += ms {
		r := request{kind: "keep-alive POST", begin: at, end: at + ms/2, pid: 1}
		switch {
		case at == 1100*ms || at == 1200*ms:
			r.pid, r.failure = 0, "connection reset"
		case at > 2020*ms && at != 2100*ms:
			r.pid = 3
		case at > 1010*ms && at != 1400*ms && at != 2100*ms:
			r.pid = 2
		}
		tr.requests = append(tr.requests, r)
	}
	b := &bench{}
	upgrades := []time.Duration{1000 * ms, 2000 * ms}
	b.countRequests(peerOf(ours), 0, tr, 500*ms, upgrades)
	b.observeHandovers(peerOf(ours), 0, tr, upgrades)
	return b
}

func TestRequestsAreCounted(t *testing.T) {
	b := played(t)
	for metric, want := range map[string]float64{"control sent": 500, "control failed": 0, "sent": 2000, "failed": 2} {
		if got := b.sum(requests, ours, "keep-alive POST", metric); got != want {
			t.Errorf("%s: got %g, want %g", metric, got, want)
		}
	}
	if all, rounds := b.failedPerUpgrade(ours, ""); all != 1 || !reflect.DeepEqual(rounds, []float64{1}) {
		t.Errorf("got %g failed per upgrade and %v by round, want 1", all, rounds)
	}
	if b.lost() != 2 {
		t.Errorf("got %g lost, want 2", b.lost())
	}
}

func TestHandoversAreObserved(t *testing.T) {
	b := played(t)
	for metric, want := range map[string][]float64{
		"new answers":      {10, 20},
		"old answers last": {400.5, 100.5},
		"old exits":        {500},
		"old remains":      {1, 0},
	} {
		if got := values(b.of(handover, ours, "", metric)); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %v, want %v", metric, got, want)
		}
	}
}

// An upgrade that brings no new process is not one that loses nothing.
func TestUpgradeWithoutNewProcess(t *testing.T) {
	b := &bench{}
	tr := &traffic{began: time.Now().Add(-2 * time.Second), processes: []*process{{pid: 1, seen: 1}}}
	b.observeHandovers(peerOf(ours), 0, tr, []time.Duration{time.Second})
	if b.lost() == 0 {
		t.Error("nothing was lost, want a failed upgrade")
	}
}

// A generation that drains and does not answer has lost its connection.
func TestDrainingIsReported(t *testing.T) {
	b := &bench{}
	for _, n := range []string{"0", "1", "2", "3"} {
		for _, name := range []string{kept, ended} {
			for metric, value := range map[string]float64{"commit": 3, "serve": 4, "resident": 1100, "descriptors": 13} {
				b.add(draining, name, n, metric, "", 0, value)
			}
		}
	}
	b.add(draining, kept, drains, "resident", "KiB", 0, 1300)
	b.add(draining, kept, drains, "descriptors", "", 0, 37)
	b.add(draining, kept, "", "asked", "", 0, 30)
	if b.lost() != 0 {
		t.Errorf("got %g lost, want none", b.lost())
	}
	b.add(draining, kept, "", "failed", "", 0, 2)
	if b.lost() != 2 {
		t.Errorf("got %g lost, want 2", b.lost())
	}
	if got := b.drainingSizes(); !reflect.DeepEqual(got, []string{"0", "1", "2", "3"}) {
		t.Errorf("got the sizes %q, want powers of two and the most", got)
	}
	dir := t.TempDir()
	if err := b.report(dir); err != nil {
		t.Fatal(err)
	}
	report, err := os.ReadFile(filepath.Join(dir, "report.md"))
	if err != nil || !strings.Contains(string(report), "Of 30 answers on their connections, 2 failed.") {
		t.Errorf("the report does not say what failed (%v):\n%s", err, report)
	}
	if _, err := os.Stat(filepath.Join(dir, "draining.svg")); err != nil {
		t.Error(err)
	}
}

func TestResultsAreReadAsWritten(t *testing.T) {
	b := played(t)
	b.set("date", "22 November 2026")
	var file bytes.Buffer
	if err := b.write(&file); err != nil {
		t.Fatal(err)
	}
	got, err := readResults(&file)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.rows, b.rows) {
		t.Errorf("got %v, want %v", got.rows, b.rows)
	}
}

func TestReportShowsLosses(t *testing.T) {
	b := played(t)
	dir := t.TempDir()
	if err := b.report(dir); err != nil {
		t.Fatal(err)
	}
	report, err := os.ReadFile(filepath.Join(dir, "report.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"**1.0**", "connection reset: 2", "0 of 500"} {
		if !strings.Contains(string(report), want) {
			t.Errorf("the report has no %q:\n%s", want, report)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "failed.svg")); err != nil {
		t.Error(err)
	}
}
