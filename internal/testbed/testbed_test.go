//go:build linux

package main

import (
	"io"
	"os"
	"testing"
	"time"
)

// These tests have the same faults in each run. Others are for the command.

// patience is longer than the command's deadline, because of what the kernel does not account for: a
// disk that is slow, and a virtual machine's processor that is taken away.
const patience = 2 * time.Second

// TestShort is the form for CI: half a minute.
func TestShort(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	cfg := config{
		library: tableflip, seed: 1,
		upgrades: 8, faultCount: 4, duration: 20 * time.Second,
		clients: 1, pace: 10 * time.Millisecond, deadline: patience,
		grace: 500 * time.Millisecond, drain: 20 * time.Second, upgradeTimeout: 3 * time.Second, acknowledgeTimeout: time.Second,
	}
	runHere(t, cfg)
}

// TestTrial has the new process fail, or be stopped, suspended or killed, while it serves
// beside the old one.
func TestTrial(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a quarter of a minute")
	}
	runHere(t, config{
		library: tableflip, seed: 2,
		upgrades: 1, faultCount: 4, only: "trial", duration: 5 * time.Second, trial: 1500 * time.Millisecond,
		clients: 1, pace: 10 * time.Millisecond, deadline: patience,
		grace: 500 * time.Millisecond, drain: 20 * time.Second, upgradeTimeout: 3 * time.Second, acknowledgeTimeout: 500 * time.Millisecond,
	})
}

// TestInARow is the same without clients, for whatever the next upgrade would show.
func TestInARow(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	runHere(t, config{
		library: tableflip, seed: 3,
		inARow: 100, duration: 20 * time.Second,
		grace: time.Millisecond, drain: 20 * time.Second, upgradeTimeout: 3 * time.Second, acknowledgeTimeout: time.Second,
	})
}

func runHere(t *testing.T, cfg config) {
	t.Helper()
	b, err := run(t.Context(), cfg, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if b.report(t.Output()) > 0 {
		t.Error("see above; the end of the servers' log:")
		tail(t, b.logPath(), 16<<10)
	}
}

func tail(t *testing.T, path string, n int64) {
	t.Helper()
	log, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if size, err := log.Seek(0, io.SeekEnd); err == nil && size > n {
		log.Seek(-n, io.SeekEnd)
	} else {
		log.Seek(0, io.SeekStart)
	}
	io.Copy(t.Output(), log)
}
