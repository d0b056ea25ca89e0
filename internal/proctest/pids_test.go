//go:build unix

package proctest

import (
	"os/exec"
	"syscall"
	"testing"
)

// A process that was given the PID of one that has ended must live.
func TestPIDsKillNoOthers(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	OK(t, cmd.Start())
	pid := cmd.Process.Pid
	defer cmd.Wait()
	defer cmd.Process.Kill()

	var pids PIDs
	pids.Add(pid)
	started := pids.started[pid]
	pids.started[pid] = "at another time"
	pids.Kill()
	Suspend(t, pid) // a dead one would not stop
	if _, _, ended := Ended(pid); ended {
		t.Fatal("an unrelated process was killed")
	}

	pids.started[pid] = started
	pids.Kill()
	AwaitThat(t, "the process has ended", func() bool {
		status, _, ended := Ended(pid)
		return ended && status.Signal() == syscall.SIGKILL
	})
}
