//go:build unix

package proctest

import (
	"encoding/json"
	"net"
	"os/exec"
	"strings"
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

// To the test, the PID of a process in another PID namespace means an unrelated process.
func TestPIDsOfAnotherNamespace(t *testing.T) {
	stranger := exec.Command("sleep", "1000")
	OK(t, stranger.Start())
	pid := stranger.Process.Pid
	defer stranger.Wait()
	defer stranger.Process.Kill()

	t.Run("service", func(t *testing.T) {
		s := NewService(t)
		_, addr, _ := strings.Cut(s.Wire(), "=")
		conn := Opened[net.Conn](t)(net.Dial("tcp", addr))
		OK(t, json.NewEncoder(conn).Encode(Message{PID: pid, Event: "joined", Text: "another"}))
		p := s.Next()
		conn.Close()
		p.AwaitEnd()
	})
	Suspend(t, pid) // a dead one would not stop
}
