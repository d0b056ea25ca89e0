//go:build linux

package proc

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel tells that processes wait for the one processor that all of them may use, and
// nothing of processes that are stopped.
func TestWaits(t *testing.T) {
	var allowed, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		t.Fatal(err)
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if allowed.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	var busy []*exec.Cmd
	var pids []int
	for range 5 {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", "while :; do :; done")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Wait()
		defer cmd.Process.Kill()
		busy, pids = append(busy, cmd), append(pids, cmd.Process.Pid)
		if err := unix.SchedSetaffinity(cmd.Process.Pid, &one); err != nil {
			t.Fatal(err)
		}
	}

	w := NewWaits()
	if got := w.Longest(pids...); got != 0 {
		t.Errorf("what was before the first call counts: %v", got)
	}
	waited := time.Duration(0) // by the first
	for end := time.Now().Add(time.Minute); waited < 200*time.Millisecond; time.Sleep(10 * time.Millisecond) {
		waited += w.Longest(pids[0])
		if time.Now().After(end) {
			t.Fatalf("one of five processes on one processor has waited for %v", waited)
		}
	}
	if got := w.Longest(pids[1:]...); got == 0 {
		t.Error("the others have not waited")
	}

	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		for p, _ := Find(pid); p.State != Stopped; p, _ = Find(pid) {
			time.Sleep(time.Millisecond)
		}
	}
	w.Longest(pids...)
	time.Sleep(50 * time.Millisecond)
	if got := w.Longest(pids...); got != 0 {
		t.Errorf("stopped processes have waited for a processor for %v", got)
	}
	if got := w.Longest(1<<30, os.Getpid()); got != 0 {
		t.Errorf("a process that is not there, and one that is new, have waited for %v", got)
	}

	busy[0].Process.Kill()
	busy[0].Wait()
	if ran := busy[0].ProcessState.UserTime() + busy[0].ProcessState.SystemTime(); ran >= waited {
		t.Errorf("one of five processes on one processor ran for %v, and waited for %v", ran, waited)
	}
}
