//go:build unix

package handovertest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// A child whose parent dies before Ready, as a program sees it.

// In cloudflare/tableflip v1.2.3 Ready fails with EPIPE, the documented pattern panics,
// and no process is left.
func TestOrphan(t *testing.T) {
	for _, moment := range []string{"before New", "before Listen", "before Ready"} {
		t.Run(moment, func(t *testing.T) {
			dir := proctest.SocketDir(t)
			pidFile, path := filepath.Join(dir, "pid"), filepath.Join(dir, "s")
			s, first := proctest.Start(t, "orphan", proctest.WithArg(moment+"\n"+dir))
			tcp := s.Await("parent").Text
			child := s.Await("Ready")
			if child.PID == first.Process.Pid || child.Text != "<nil> true" {
				t.Errorf("Ready and HasParent: %v", child)
			}
			if m := s.Await("WaitForParent"); m.Text != "<nil>" {
				t.Errorf("WaitForParent: %s", m.Text)
			}
			if m := s.Await("Upgrade"); m.Text != "true" {
				t.Error("Upgrade was not accepted")
			}
			if content, err := os.ReadFile(pidFile); string(content) != strconv.Itoa(child.PID) {
				t.Errorf("the PID file holds %q, %v, want %d", content, err, child.PID)
			}
			for _, socket := range []struct{ network, addr string }{{"tcp", tcp}, {"unix", path}} {
				if got := proctest.Answer(t, socket.network, socket.addr); got != strconv.Itoa(child.PID) {
					t.Errorf("%s: the answer is %q, want %d", socket.network, got, child.PID)
				}
			}
			proctest.Terminate(t, child.PID)
			s.AwaitEnd()
			if proctest.Exists(path) || proctest.Exists(pidFile) {
				t.Error("the process in charge did not clean up")
			}
		})
	}
}

func killParent() {
	parent := os.Getppid()
	syscall.Kill(parent, syscall.SIGKILL)
	// By the time that a process gets another parent, the descriptors of the old one
	// are closed.
	for os.Getppid() == parent {
		runtime.Gosched()
	}
}

func init() {
	proctest.Role("orphan", func() {
		terminated := proctest.Terminated()
		moment, dir, _ := strings.Cut(proctest.Arg(), "\n")
		isChild := inherit.Variables() != nil
		killParentAt := func(now string) {
			if !isChild || now != moment {
				return
			}
			killParent()
		}

		killParentAt("before New")
		upg := proctest.Must(tableflip.New(tableflip.Options{
			PIDFile: filepath.Join(dir, "pid"),
			Command: func(cmd *exec.Cmd) {
				if isChild {
					proctest.Unstartable(cmd)
				}
			},
		}))
		killParentAt("before Listen")
		listeners := []net.Listener{
			proctest.Must(upg.Listen("tcp", "localhost:0")),
			proctest.Must(upg.Listen("unix", filepath.Join(dir, "s"))),
		}
		if !upg.HasParent() {
			MustBeReady(upg)
			proctest.Report("parent", listeners[0].Addr())
			upg.Upgrade()
			panic("the parent lives on")
		}
		killParentAt("before Ready")
		proctest.Report("Ready", upg.Ready(), upg.HasParent())
		proctest.Report("WaitForParent", upg.WaitForParent(context.Background()))
		proctest.Report("Upgrade", errors.Is(upg.Upgrade(), os.ErrNotExist))
		for _, ln := range listeners {
			go func() {
				conn := proctest.Must(ln.Accept())
				proctest.Must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
				conn.Close()
			}()
		}
		<-terminated
		upg.Stop()
	})
}

// Ready leaves nothing behind that it has made when Stop is called.
func TestOrphanReadyStop(t *testing.T) {
	dir := proctest.SocketDir(t)
	s, _ := proctest.Start(t, "stopped orphan", proctest.WithArg(dir))
	if m := s.Await("left"); m.Text != "[]" {
		t.Errorf("Ready and Stop have left %s", m.Text)
	}
	s.AwaitEnd()
}

func init() {
	proctest.Role("stopped orphan", func() {
		dir := proctest.Arg()
		upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: filepath.Join(dir, "pid")}))
		if !upg.HasParent() {
			MustBeReady(upg)
			upg.Upgrade()
			panic("the parent lives on")
		}
		killParent()
		proctest.Must(0, upg.WaitForParent(context.Background()))
		step.SetHook(func(s step.Step) {
			if s == step.PIDFilePrepared {
				upg.Stop()
			}
		})
		upg.Ready()
		proctest.Report("left", proctest.Must(filepath.Glob(filepath.Join(dir, "*.tmp"))))
	})
}

// An orphan that can't take charge says so, and may try again.
func TestOrphanCommitFails(t *testing.T) {
	t.Parallel()
	c := newChain(t)
	parent, reaped := c.start(c.DieAt(step.ReadyReceived))
	parent.AwaitStep(alone)
	parent.Order("upgrade", c.PauseAt(step.VerdictReceived))
	child := c.Next()
	child.AwaitStep(step.VerdictReceived)
	<-reaped
	proctest.OK(t, os.Remove(filepath.Join(c.dir, "pid.tmp")))
	child.Resume()
	if m := child.Await("refused"); !strings.Contains(m.Text, "can't replace the PID file") {
		t.Errorf("Ready returned %q", m.Text)
	}
}

// While Ready takes charge, a parent that has ended is not listed, and one that lives is.
func TestGenerationsTakingCharge(t *testing.T) {
	for _, orphan := range []bool{false, true} {
		t.Run(fmt.Sprint("orphan ", orphan), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pid")
			s, first := proctest.Start(t, "look-at-commit", proctest.WithArg(fmt.Sprint(orphan, " ", path)))
			m := s.Await("committing")
			want := fmt.Sprintf("2 %d starting", m.PID)
			if !orphan {
				want = fmt.Sprintf("1 %d in charge, %s", first.Process.Pid, want)
			}
			if m.Text != want+": "+tableflip.ErrNotReady.Error() {
				t.Errorf("the generations and Upgrade: %s, want %s", m.Text, want)
			}
		})
	}
}

// Nor does a first generation ask a parent that it does not have.
func TestGenerationsFirstTakingCharge(t *testing.T) {
	upg := NewUpgrader(t, tableflip.Options{PIDFile: filepath.Join(t.TempDir(), "pid")})
	proctest.During(t, step.PIDFileWritten, func() {
		if got, want := lineage(upg), fmt.Sprintf("1 %d starting", os.Getpid()); got != want {
			t.Errorf("the generations are %s, want %s", got, want)
		}
	})
	proctest.OK(t, upg.Ready())
}

func init() {
	proctest.Role("look-at-commit", func() {
		orphan, path, _ := strings.Cut(proctest.Arg(), " ")
		upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: path}))
		if !upg.HasParent() {
			MustBeReady(upg)
			proctest.Must(0, upg.Upgrade())
			return
		}
		if orphan == "true" {
			killParent()
			proctest.Must(0, upg.WaitForParent(context.Background()))
		}
		proctest.When(step.PIDFileWritten, func() {
			proctest.Report("committing", fmt.Sprint(lineage(upg), ": ", upg.Upgrade()))
		})
		MustBeReady(upg)
	})
}
