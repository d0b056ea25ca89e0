package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
)

// While a process with threads dies, its first thread can be a zombie, and the
// others hold its descriptors, for tens of milliseconds on a busy machine.

const leaderless = "leaderless"

func init() {
	if os.Getenv(roleVariable) == leaderless {
		runtime.LockOSThread() // the main goroutine is on the first thread
	}
	roles[leaderless] = func() {
		go func() {
			await(syscall.SIGTERM)
			os.Exit(0)
		}()
		syscall.RawSyscall(syscall.SYS_EXIT, 0, 0, 0)
	}
}

func TestRunningWithoutFirstThread(t *testing.T) {
	t.Setenv(roleVariable, leaderless)
	cmd := exec.Command(os.Args[0])
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	eventually(t, "the first thread is a zombie", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err == nil && bytes.Contains(stat, []byte(") Z "))
	})
	if !running(pid) {
		t.Error("the process is not running")
	}
	cmd.Process.Kill()
	cmd.Wait()
	if running(pid) {
		t.Error("the process is still running")
	}
}
