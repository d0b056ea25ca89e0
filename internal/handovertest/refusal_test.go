//go:build unix

package handovertest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// A child is refused or gives up, or Stop meets the commit.

// A child that has said that it is ready when its Stop is called must not be put
// in charge.
func TestReadyStopped(t *testing.T) {
	dir := proctest.SocketDir(t)
	path, pidFile := filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	upg, s := NewParent(t, tableflip.Options{PIDFile: pidFile}, "stop-in-ready", proctest.WithArg(dir))
	proctest.OK(t, proctest.ErrorOf(upg.Listen("unix", path)))
	proctest.OK(t, upg.Ready())
	proctest.During(t, step.ReadyReceived, func() {
		if m := s.Await("ready"); m.Text != "true" {
			t.Error("Ready did not return ErrStopped in the child")
		}
		if !proctest.Exists(pidFile + ".tmp") {
			t.Error("the child has removed what its parent may have given to the next child")
		}
	})
	if err := upg.Upgrade(); err == nil {
		t.Error("the child was put in charge")
	}
	if proctest.IsClosed(upg.Exit()) || !proctest.Exists(path) || proctest.Exists(pidFile+".tmp") {
		t.Error("the parent is no longer in charge")
	}
}

func init() {
	proctest.Role("stop-in-ready", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: filepath.Join(proctest.Arg(), "pid")}))
		proctest.Must(upg.Listen("unix", filepath.Join(proctest.Arg(), "s")))
		stopped := make(chan struct{})
		proctest.When(step.ReadySaid, func() {
			go func() {
				upg.Stop()
				close(stopped)
			}()
		})
		err := upg.Ready()
		<-stopped
		proctest.Report("ready", errors.Is(err, tableflip.ErrStopped))
		proctest.UntilKilled()
	})
}

// The wrapper is killed, and the child that was refused lives on, because it is in a
// PID namespace of its own and the parent does not know it: it must hear of the
// refusal, and touch nothing.
func TestReadyRefused(t *testing.T) {
	wrapper := `exec unshare --pid --fork "$0"`
	if runtime.GOOS != "linux" || os.Getuid() != 0 {
		if runtime.GOOS == "linux" {
			t.Skip("only root can make a PID namespace")
		}
		wrapper = `"$0" & wait` // there the parent cannot prove whom it would kill
	}
	dir := proctest.SocketDir(t)
	path, pidFile := filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	upg, s := NewParent(t, tableflip.Options{
		Command: proctest.Shell(wrapper),
		PIDFile: pidFile,
	}, "refused", proctest.WithArg(dir))
	proctest.OK(t, proctest.ErrorOf(upg.Listen("unix", path)))
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancel(t.Context())
	proctest.During(t, step.ReadyReceived, cancel)
	proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	proctest.OK(t, os.WriteFile(filepath.Join(dir, "over"), nil, 0o600))
	first := s.Await("Ready").Text
	if !strings.Contains(first, "aborted") {
		t.Errorf("Ready: %s", first)
	}
	for _, call := range []string{"Ready-again", "WaitForParent"} {
		if m := s.Await(call); m.Text != first {
			t.Errorf("%s: %s, want %s", call, m.Text, first)
		}
	}
	if m := s.Await("Upgrade"); m.Text != tableflip.ErrNotReady.Error() {
		t.Errorf("Upgrade: %s", m.Text)
	}
	s.AwaitEnd()
	if !proctest.Exists(path) {
		t.Error("the refused child has unlinked its parent's socket")
	}
	if content, err := os.ReadFile(pidFile); string(content) != strconv.Itoa(os.Getpid()) {
		t.Errorf("the PID file holds %q, %v", content, err)
	}
	if proctest.Exists(pidFile + ".tmp") {
		t.Error("Ready has prepared a PID file after it was refused")
	}
}

func init() {
	proctest.Role("refused", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: filepath.Join(proctest.Arg(), "pid")}))
		proctest.Must(upg.Listen("unix", filepath.Join(proctest.Arg(), "s")))
		proctest.Report("Ready", upg.Ready())
		// Until the parent has cleaned up.
		for late := time.Now().Add(proctest.Patience); !proctest.Exists(filepath.Join(proctest.Arg(), "over")) && time.Now().Before(late); {
			time.Sleep(time.Millisecond) // a poll
		}
		proctest.Report("Ready-again", upg.Ready())
		proctest.Report("WaitForParent", upg.WaitForParent(context.Background()))
		proctest.Report("Upgrade", upg.Upgrade())
		upg.Stop()
	})
}

// No upgrade begins once Stop has, which ends the one that is under way.
func TestStopMeetsNextUpgrade(t *testing.T) {
	for range 20 {
		starts := 0
		upg := NewUpgrader(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
			starts++
			proctest.Shell("exec sleep 1000")(cmd)
		}})
		proctest.OK(t, upg.Ready())
		started := make(chan bool, 2)
		restore := proctest.During(t, step.ChildStarted, func() { started <- true })
		second := proctest.InBackground(func() error {
			upg.Upgrade()
			return upg.Upgrade()
		})
		proctest.Within(t, "the first upgrade", started)
		upg.Stop()
		proctest.WantError(t, "the second upgrade", proctest.Within(t, "Upgrade", second), tableflip.ErrStopped)
		restore()
		if starts != 1 {
			t.Fatalf("%d processes were started", starts)
		}
	}
}

// Stop that meets a commit: either the child is in charge of what they share, or
// nobody is and it is gone.
func TestStopMeetsCommit(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	for range 10 {
		upg, _ := NewParent(t, tableflip.Options{}, "hold-socket", proctest.WithArg(path))
		proctest.OK(t, proctest.ErrorOf(upg.Listen("unix", path)))
		proctest.OK(t, upg.Ready())
		var stopping sync.WaitGroup
		restore := proctest.During(t, step.ReadyReceived, func() { stopping.Go(upg.Stop) })
		err := upg.Upgrade()
		restore()
		proctest.Within(t, "Stop", proctest.Waited(&stopping))
		switch {
		case err == nil && !proctest.Exists(path):
			t.Error("the child is in charge, and Stop has unlinked its socket")
		case errors.Is(err, tableflip.ErrStopped) && proctest.Exists(path):
			t.Error("Stop was first, and left the socket")
		case err != nil && !errors.Is(err, tableflip.ErrStopped):
			t.Errorf("Upgrade: %v", err)
		}
		os.Remove(path)
	}
}

func init() {
	proctest.Role("hold-socket", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Must(upg.Listen("unix", proctest.Arg()))
		upg.Ready()
	})
}

func TestChildStops(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "stop-at-once")
	proctest.OK(t, upg.Ready())
	var exit *exec.ExitError
	if err := upg.Upgrade(); !errors.As(err, &exit) || exit.ExitCode() != 9 {
		t.Errorf("Upgrade: %v, want exit status 9", err)
	}
	if m := s.Await("stopped"); m.Text != "true true" {
		t.Errorf("Exit closed and Ready refused: %s", m.Text)
	}
}

func init() {
	proctest.Role("stop-at-once", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		upg.Stop()
		upg.Stop()
		proctest.Report("stopped", proctest.IsClosed(upg.Exit()), errors.Is(upg.Ready(), tableflip.ErrStopped))
		os.Exit(9)
	})
}

// A child that calls Stop has given up even if it does not exit.
func TestChildStopsAndStays(t *testing.T) {
	shorten(t, &step.ExitGrace)
	upg, s := NewParent(t, tableflip.Options{}, "stop-and-stay")
	proctest.OK(t, upg.Ready())
	err := upg.Upgrade()
	if err == nil || !strings.Contains(err.Error(), "gave up") {
		t.Errorf("Upgrade: %v", err)
	}
	if m := s.Await("stopping"); !proctest.IsReaped(m.PID) {
		t.Error("the child was not reaped")
	}
}

func init() {
	proctest.Role("stop-and-stay", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Report("stopping")
		upg.Stop()
		proctest.UntilKilled()
	})
}
