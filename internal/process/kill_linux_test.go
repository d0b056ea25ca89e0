package process_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/proctest"
)

// otherUser owns nothing here.
const otherUser = 54321

// withoutCapabilities has cmd start without some of root's. It is to be called by the
// goroutine that starts it, whose thread ends with it.
func withoutCapabilities(capabilities ...uintptr) error {
	runtime.LockOSThread()
	for _, capability := range capabilities {
		// What root executes may have what is in this set (capabilities(7)).
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); err != nil {
			return os.NewSyscallError("prctl PR_CAPBSET_DROP", err)
		}
	}
	return nil
}

func runWithout(t *testing.T, cmd *exec.Cmd, capabilities ...uintptr) error {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can give up capabilities")
	}
	return proctest.Within(t, "the process to exit", proctest.InBackground(func() error {
		if err := withoutCapabilities(capabilities...); err != nil {
			return err
		}
		return cmd.Run()
	}))
}

func init() {
	// powerless may not kill the process of another user that it starts. That reads
	// a pipe, and so ends when it is closed.
	proctest.Role("powerless", func() {
		var pipe [2]int // in blocking mode, for cat
		proctest.Must(0, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
		read, write := os.NewFile(uintptr(pipe[0]), "read"), os.NewFile(uintptr(pipe[1]), "write")
		p := proctest.Must(process.Start(context.Background(), &exec.Cmd{
			Path: "/bin/cat", Stdin: read,
			SysProcAttr: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: otherUser, Gid: otherUser}},
		}, nil, proctest.Arg() == "sibling"))
		read.Close()
		proctest.Report("alive", process.IsAlive(p.PID()))
		kill, wait := p.Kill, func() error { <-p.Exited(); return nil }
		if proctest.Arg() == "handle" {
			handle := proctest.Must(process.Open(p.PID()))
			kill, wait = handle.Kill, handle.Wait
		}
		for range 2 { // as Stop may try, too
			err := kill(10 * time.Millisecond)
			proctest.Report("kill", p.PID(), errors.Is(err, os.ErrPermission), err)
			proctest.Report("exited", proctest.IsClosed(p.Exited()))
		}

		write.Close()
		proctest.Must(0, wait())
		proctest.Report("killed", kill(10*time.Millisecond))
	})
}

func TestKillOtherUsers(t *testing.T) {
	for _, kind := range []string{"child", "sibling", "handle"} {
		t.Run(kind, func(t *testing.T) {
			s := proctest.NewService(t)
			proctest.OK(t, runWithout(t, s.Command("powerless", proctest.WithArg(kind)), unix.CAP_KILL))
			if got := s.Await("alive").Text; got != "true" {
				t.Error("a process of another user is said not to live")
			}
			for range 2 {
				pid, text, _ := strings.Cut(s.Await("kill").Text, " ")
				for _, want := range []string{"true tableflip: ", "process " + pid, fmt.Sprint("user ", otherUser), "operation not permitted"} {
					if !strings.Contains(text, want) {
						t.Errorf("got %q, which does not contain %q", text, want)
					}
				}
				if got := s.Await("exited").Text; got != "false" {
					t.Error("a process that runs is said to have exited")
				}
			}
			if got := s.Await("killed").Text; got != "<nil>" {
				t.Errorf("once it has ended: %s", got)
			}
			reapAll()
		})
	}
}

// reapAll is for siblings of this process's children.
func reapAll() {
	for {
		if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
			return
		}
	}
}

func TestKill(t *testing.T) {
	p, err := process.Start(t.Context(), &exec.Cmd{Path: "/bin/sleep", Args: []string{"sleep", "100"}}, nil, false)
	proctest.OK(t, err)
	proctest.OK(t, p.Kill(proctest.Patience))
	if p.Err() == nil || p.Err().Error() != "signal: killed" {
		t.Errorf("it ended with %v", p.Err())
	}
	proctest.OK(t, p.Kill(0))
}

func TestOpenEnded(t *testing.T) {
	cmd := exec.Command("/bin/true")
	proctest.OK(t, cmd.Run())
	_, err := process.Open(cmd.Process.Pid)
	proctest.WantError(t, "Open", err, os.ErrProcessDone)
	if parent := process.Parent(cmd.Process.Pid); parent != 0 {
		t.Errorf("its parent is %d", parent)
	}
}

// Who has an end of a pipe open does not hold the other.
func TestHoldsPipe(t *testing.T) {
	read, write, err := os.Pipe()
	proctest.OK(t, err)
	defer read.Close()
	defer write.Close()
	var stat unix.Stat_t
	proctest.OK(t, unix.Fstat(int(read.Fd()), &stat))
	holds := func(pid int, end process.PipeEnd) bool {
		t.Helper()
		holds, err := process.HoldsPipe(pid, stat.Ino, end)
		proctest.OK(t, err)
		return holds
	}
	for _, end := range []process.PipeEnd{process.ReadEnd, process.WriteEnd} {
		if !holds(os.Getpid(), end) {
			t.Errorf("this process does not hold %o", end)
		}
		if holds(os.Getppid(), end) {
			t.Errorf("another process holds %o", end)
		}
	}
	write.Close()
	if !holds(os.Getpid(), process.ReadEnd) || holds(os.Getpid(), process.WriteEnd) {
		t.Error("this process holds the end that it has closed, or not the other")
	}

	_, err = process.HoldsPipe(0, stat.Ino, process.ReadEnd) // of which nothing is known
	proctest.WantError(t, "HoldsPipe", err, os.ErrNotExist)
}

// A firstWrite tells that it was written to.
type firstWrite chan bool

func (said firstWrite) Write(data []byte) (int, error) {
	select {
	case said <- true:
	default:
	}
	return len(data), nil
}

// A process that is killed can take for ever to end, for example in the read of a file
// from a dead server. Here it has ended, and what it said cannot be read to the end.
func TestKillTakesLong(t *testing.T) {
	read, write, err := os.Pipe()
	proctest.OK(t, err)
	defer write.Close()
	said := make(firstWrite, 1)
	cmd := exec.Command("/bin/sh", "-c", "cat <&3 & echo; exec sleep 100")
	cmd.Stdout = said
	p, err := process.Start(t.Context(), cmd, []uintptr{read.Fd()}, false)
	proctest.OK(t, err)
	read.Close()
	proctest.Within(t, "the shell to start cat", said)

	err = p.Kill(time.Millisecond)
	proctest.WantError(t, "Kill", err, os.ErrDeadlineExceeded)
	if want := "process " + strconv.Itoa(p.PID()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, which does not contain %q", err, want)
	}
	write.Close()
	proctest.Within(t, "the process to exit", p.Exited())
}
