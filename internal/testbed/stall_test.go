//go:build linux

package main

import (
	"context"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"example.com/tableflip/internal/testbed/proc"
)

// More servers than there are processors have to wait, which is noted without asking them.
func TestWatchStalls(t *testing.T) {
	var busy []int
	for range runtime.NumCPU() + 1 {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", "while :; do :; done")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Wait()
		defer cmd.Process.Kill()
		busy = append(busy, cmd.Process.Pid)
	}
	r := newRecorder(time.Second, time.Second)
	ctx, stop := context.WithCancel(t.Context())
	began, done := time.Now(), make(chan struct{})
	go func() {
		defer close(done)
		r.watchStalls(ctx, func() []int { return busy })
	}()
	defer func() { <-done }()
	defer stop()
	waits, waited := proc.NewWaits(), time.Duration(0)
	for end := began.Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		waited += waits.Longest(busy...)
		noted := r.stalledSince(began)
		if noted > 100*time.Millisecond && noted > waited/4 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the servers have waited for %v, and %v were noted", waited, noted)
		}
	}
}
