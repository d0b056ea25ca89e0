//go:build unix

package systemd

import (
	"errors"
	"os"
	"syscall"
	"testing"
)

// A process with a descriptor for the socket, and none for the pipe, learns that before
// the commit, and keeps the descriptor.
func TestPrepareMainPIDWithoutDescriptors(t *testing.T) {
	n, _ := manager(t)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	few := limit
	few.Cur = 64
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit) })
	var last *os.File
	for {
		file, err := os.Open(os.DevNull)
		if errors.Is(err, syscall.EMFILE) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		last = file
	}
	last.Close()

	for range 2 {
		if _, err := n.PrepareMainPID(); !errors.Is(err, syscall.EMFILE) {
			t.Errorf("got %v", err)
		}
	}
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatalf("the socket stayed open: %v", err)
	}
	file.Close()
}

// A process that has begun an upgrade is not ready yet.
func TestMainPID(t *testing.T) {
	n, conn := manager(t)
	for ready, want := range map[bool]string{false: "MAINPID=5", true: "MAINPID=5\nREADY=1\nSTATUS="} {
		n.MainPID(5, ready)
		message := make([]byte, 100)
		if size, err := conn.Read(message); err != nil || string(message[:size]) != want {
			t.Errorf("ready %t: the manager got %q, %v", ready, message[:size], err)
		}
	}
}
