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
		kill := p.Kill
		if proctest.Arg() == "handle" {
			kill = proctest.Must(process.Open(p.PID())).Kill
		}
		for range 2 { // as Stop may try, too
			err := kill(10 * time.Millisecond)
			proctest.Report("kill", p.PID(), errors.Is(err, os.ErrPermission), err)
			proctest.Report("exited", proctest.IsClosed(p.Exited()))
		}

		write.Close()
		<-p.Exited()
		proctest.Report("killed", kill(10*time.Millisecond))
	})
}

func TestKillOtherUsers(t *testing.T) {
	for _, kind := range []string{"child", "sibling", "handle"} {
		t.Run(kind, func(t *testing.T) {
			s := proctest.NewService(t)
			proctest.OK(t, runWithout(t, s.Command("powerless", proctest.WithArg(kind)), unix.CAP_KILL))
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
