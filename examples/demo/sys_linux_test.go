package main

import (
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"example.com/tableflip/internal/proctest"
)

// While a process with threads dies, its first thread can be a zombie, and the
// others hold its descriptors, for tens of milliseconds on a busy machine.

const leaderless = "leaderless"

func init() {
	runtime.LockOSThread() // the main goroutine is on the first thread
	proctest.Role(leaderless, func() {
		go func() {
			await(syscall.SIGTERM)
			os.Exit(0)
		}()
		syscall.RawSyscall(syscall.SYS_EXIT, 0, 0, 0)
	})
}

func TestRunningWithoutFirstThread(t *testing.T) {
	setRole(t, leaderless)
	cmd := exec.Command(os.Args[0])
	proctest.OK(t, cmd.Start())
	pid := cmd.Process.Pid
	proctest.AwaitThat(t, "the first thread is a zombie", func() bool { return proctest.IsZombie(pid) })
	if !running(pid) {
		t.Error("the process is not running")
	}
	cmd.Process.Kill()
	cmd.Wait()
	if running(pid) {
		t.Error("the process is still running")
	}
}
