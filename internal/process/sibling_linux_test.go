package process_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/proctest"
)

// Here the test is the service manager.

// forbidPidfds makes this process's kernel one that knows no pidfds, by a filter of its
// system calls (seccomp(2)).
func forbidPidfds() error {
	const number = 0 // offset in struct seccomp_data
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_PIDFD_OPEN, Jt: 0, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return errno
	}
	if fd, err := unix.PidfdOpen(os.Getpid(), 0); !errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("pidfd_open: %d, %v", fd, err)
	}
	return nil
}

func init() {
	// starter starts a sibling, and ends it in a way.
	proctest.Role("starter", func() {
		kernel, way, _ := strings.Cut(proctest.Arg(), " ")
		if kernel == "old" {
			proctest.Must(0, forbidPidfds())
		}
		cmd := &exec.Cmd{Path: os.Args[0], Args: os.Args[:1]}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = process.Streams()
		cmd.Env = append(os.Environ(), proctest.Environment("started"), proctest.WithArg(way))
		pidfd := -2
		sibling := true
		if kernel == "own" {
			cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd, Cloneflags: unix.CLONE_PARENT}
			sibling = false // but for the flag
		}
		read, write, err := os.Pipe()
		proctest.Must(0, err)
		if _, err := process.Start(context.Background(), &exec.Cmd{Path: "/missing"}, nil, true); !errors.Is(err, unix.ENOENT) {
			panic(err)
		}
		debug.SetGCPercent(-1)
		before := len(proctest.Must(os.ReadDir("/proc/self/fd")))
		if kernel != "own" {
			output := &strings.Builder{}
			sh := &exec.Cmd{Path: "/bin/sh", Args: []string{"sh", "-c", "(sleep 0.3; echo late)&"}, Stdout: output}
			<-proctest.Must(process.Start(context.Background(), sh, nil, true)).Exited()
			if output.String() != "late\n" {
				panic("what the sibling has started wrote " + output.String())
			}
		}
		p := proctest.Must(process.Start(context.Background(), cmd, []uintptr{write.Fd()}, sibling))
		proctest.Must(read.Read(make([]byte, 1))) // it has reported

		if kernel == "own" {
			proctest.Report("pidfd", unix.PidfdSendSignal(pidfd, 0, nil, 0))
		}
		if way == "killed" {
			exited := p.Exited()
			proctest.Must(0, exec.Command("/bin/true").Run()) // in which a wrong end can show itself
			proctest.Report("still", proctest.IsClosed(exited))
			proctest.Must(0, p.Kill(proctest.Patience))
		}
		<-p.Exited()
		proctest.Report("ended", p.PID(), p.Err() == process.ErrStatusUnknown, p.Err())
		proctest.Report("again", p.Kill(0))
		proctest.Report("opened", len(proctest.Must(os.ReadDir("/proc/self/fd")))-before)
	})
	proctest.Role("started", func() {
		proctest.Report("started", os.Getppid())
		proctest.Must(os.NewFile(3, "write").Write([]byte("1")))
		if proctest.Arg() == "killed" {
			proctest.UntilKilled()
		}
		os.Exit(3)
	})
}

var statuses = map[string]string{"exits": "exit status 3", "killed": "signal: killed"}

func TestSibling(t *testing.T) {
	for _, kernel := range []string{"new", "old", "own"} {
		for _, way := range []string{"exits", "killed"} {
			t.Run(kernel+" "+way, func(t *testing.T) {
				s, _ := proctest.Start(t, "starter", proctest.WithArg(kernel+" "+way))
				child := s.Await("started")
				if want := strconv.Itoa(os.Getpid()); child.Text != want {
					t.Errorf("its parent is %s, want %s", child.Text, want)
				}
				if kernel == "own" && s.Await("pidfd").Text != "<nil>" {
					t.Error("Options.Command has got no pidfd")
				}
				if way == "killed" && s.Await("still").Text != "false" {
					t.Error("it has exited before it was killed")
				}

				var ended string
				if kernel == "old" {
					// Its status is not told: a zombie has ended.
					ended = s.Await("ended").Text
				}
				var status syscall.WaitStatus
				if pid, err := syscall.Wait4(child.PID, &status, 0, nil); pid != child.PID {
					t.Fatalf("waiting for %d, which should be a child of this process: %v", child.PID, err)
				}
				if killed := status.Signaled() && status.Signal() == syscall.SIGKILL; killed != (way == "killed") {
					t.Errorf("wait status %#x", status)
				}
				want := fmt.Sprint(child.PID, " true ", process.ErrStatusUnknown)
				if ended == "" {
					ended = s.Await("ended").Text
				}
				if known := fmt.Sprint(child.PID, " false ", statuses[way]); ended != want && (kernel == "old" || ended != known) {
					t.Errorf("got %q, want %q or, from a new kernel, %q", ended, want, known)
				}
				if got := s.Await("again").Text; got != "<nil>" {
					t.Errorf("killing it again: %s", got)
				}
				opened := "0"
				if kernel == "own" {
					opened = "1" // its pidfd
				}
				if got := s.Await("opened").Text; got != opened {
					t.Errorf("%s descriptors stay open, want %s", got, opened)
				}
				s.AwaitEnd()
				reapAll()
			})
		}
	}
}
