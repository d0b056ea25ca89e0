package supervise

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
)

func init() {
	proctest.Role("under shell", func() {
		if (&terminal{own: unix.Getpgrp()}).underShell() {
			os.Exit(1)
		}
	})
	proctest.Role("foreign proc", func() {
		child := exec.Command("sleep", "1000")
		proctest.Must(0, child.Start())
		_, known := descendants()
		found := fmt.Sprint(procMounted(), isAncestor(os.Getppid()), isDescendant(child.Process.Pid), known)
		proctest.Must(0, child.Process.Kill())
		child.Wait()
		if want := "false true true false"; found != want {
			fmt.Println("found", found, "want", want)
			os.Exit(1)
		}
	})
}

// A /proc of another PID namespace says nothing of processes that have other numbers there.
func TestForeignProc(t *testing.T) {
	t.Parallel()
	const parent = `"$@"; exit $?`
	const first = `for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do (:); done; sh -c '` + parent + `' sh "$@"; exit $?`
	succeedsUnshared(t, append([]string{"sh", "-c", first, "sh"}, proctest.Arguments("foreign proc")...)...)
}

// No shell watches a session whose parent is in another PID namespace.
func TestUnderShellOfNamespace(t *testing.T) {
	t.Parallel()
	succeedsUnshared(t, proctest.Arguments("under shell")...)
}

// succeedsUnshared runs a command as process 1 of a PID namespace, and of a session.
func succeedsUnshared(t *testing.T, arguments ...string) {
	t.Helper()
	cmd := exec.Command(arguments[0], arguments[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Setsid: true}
	if output, err := cmd.CombinedOutput(); errors.Is(err, unix.EPERM) {
		t.Skip("needs root")
	} else if err != nil {
		t.Errorf("%v: %s", err, output)
	}
}

// A process whose first thread has ended lives, although it is shown as a zombie.
func TestFirstThreadEnds(t *testing.T) {
	t.Parallel()
	arguments := proctest.Arguments("first thread ends")
	if output, err := exec.Command(arguments[0], arguments[1:]...).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, output)
	}
}

func init() {
	proctest.Role("first thread ends", func() {
		stat := fmt.Sprintf("/proc/%d/stat", os.Getpid())
		for !bytes.Contains(proctest.Must(os.ReadFile(stat)), []byte(") Z ")) {
			go func() { // on each thread in turn, because one that is locked is not used again
				runtime.LockOSThread()
				if unix.Gettid() == os.Getpid() {
					unix.Syscall(unix.SYS_EXIT, 0, 0, 0)
				}
				select {}
			}()
			time.Sleep(time.Millisecond) // the pace
		}
		if statOf(os.Getpid()).zombie {
			fmt.Println("it is taken for a zombie")
			os.Exit(1)
		}
	})
}

func TestStatOfNobody(t *testing.T) {
	if got := statOf(1 << 30); got != (stat{}) {
		t.Errorf("got %+v", got)
	}
	if serves(1 << 30) {
		t.Error("nobody serves")
	}
	if _, err := watchProcess(1 << 30); err == nil {
		t.Error("nobody is watched")
	}
}

// A signal goes to nobody who is not the service's, and leaves nothing open.
func TestSignalDescendant(t *testing.T) {
	child := listening(t, nil)
	opened := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	if statOf(child).zombie {
		t.Error("a process with one thread is taken for a zombie")
	}
	before := opened()
	if err := signalDescendant(child, 0); err != nil {
		t.Errorf("a child: %v", err)
	}
	if err := signalDescendant(os.Getppid(), 0); err != unix.ESRCH {
		t.Errorf("the parent: %v", err)
	}
	if after := opened(); after != before {
		t.Errorf("%d descriptors are open, and %d were", after, before)
	}
}

// listening starts a process that has a socket, unless that is nil.
func listening(t *testing.T, file *os.File) int {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	cmd.ExtraFiles = []*os.File{file}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd.Process.Pid
}

// Of several that serve, the one counts that was started last, whatever its PID is.
func TestFindServerNewest(t *testing.T) {
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	file, err := ln.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	first := listening(t, file)
	last := listening(t, file)
	for limit := time.Now().Add(30 * time.Second); statOf(last).started <= statOf(first).started; {
		if time.Now().After(limit) {
			t.Fatal("no process is started later than another")
		}
		last = listening(t, file) // a tick later
	}
	for _, pids := range [][]int{{first, last}, {last, first}} {
		if got := findServer(pids); got != last {
			t.Errorf("of %v, %d serves, want %d", pids, got, last)
		}
	}
}
