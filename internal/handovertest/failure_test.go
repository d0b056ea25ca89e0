//go:build unix

package handovertest

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// A failed upgrade returns its cause, and leaves nothing behind.

// errors.Is and errors.As find the cause of every failed upgrade.
func TestUpgradeErrors(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		proctest.OK(t, os.WriteFile(path, []byte(content), mode))
		return path
	}
	forbidden := write("forbidden", "#!/bin/sh\n", 0o600)
	garbage := write("garbage", "\x00garbage", 0o700)
	is := func(want error) func(error) bool {
		return func(err error) bool { return errors.Is(err, want) }
	}
	says := func(text string) func(error) bool {
		return func(err error) bool { return err != nil && strings.Contains(err.Error(), text) }
	}
	exits := func(code int) func(error) bool {
		return func(err error) bool {
			var exit *exec.ExitError
			return errors.As(err, &exit) && exit.ExitCode() == code
		}
	}
	for _, test := range []struct {
		story   string
		command func(*exec.Cmd)
		cause   func(error) bool
	}{
		{"no binary", proctest.Unstartable, is(os.ErrNotExist)},
		{"no binary at a path", proctest.Unstartable, func(err error) bool {
			var path *fs.PathError
			return errors.As(err, &path) && path.Path == "/nonexistent/binary"
		}},
		{"not executable", func(cmd *exec.Cmd) { cmd.Path = forbidden }, is(os.ErrPermission)},
		{"not a binary", func(cmd *exec.Cmd) { cmd.Path = garbage }, is(syscall.ENOEXEC)},
		{"no directory", func(cmd *exec.Cmd) { cmd.Dir = "/nonexistent" }, func(err error) bool {
			var path *fs.PathError
			return errors.As(err, &path) && path.Op == "chdir"
		}},
		{"no path", func(cmd *exec.Cmd) { cmd.Path = "" }, says("Options.Command")},
		{"extra files", func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{os.Stderr} }, says("AddFile")},
		{"exit status", proctest.Shell("exit 3"), exits(3)},
		{"exit status 0", proctest.Shell("exit 0"), says("exit status 0")},
		{"panic", func(cmd *exec.Cmd) {
			cmd.Env = append(cmd.Env, proctest.Environment("panic"))
			cmd.Stderr = nil
		}, exits(2)},
		{"signal", proctest.Shell("kill -9 $$"), func(err error) bool {
			var exit *exec.ExitError
			return errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		}},
		{"unknown words", proctest.Shell("echo hello >&3; exit 3"), exits(3)},
		{"no process ID", proctest.Shell("echo here hello >&3"), says(`"hello"`)},
		{"no process ID so large", proctest.Shell("echo here 99999999999999999999 >&3"), says(`said "9999`)},
		{"no words behind here", proctest.Shell("echo here >&3"), says(`said ""`)},
		// To signal these would be to signal groups of processes.
		{"process ID 0", proctest.Shell("echo here 0 >&3"), says(`said "0"`)},
		{"process ID -7", proctest.Shell("echo here -7 >&3"), says(`said "-7"`)},
		{"ready before here", proctest.Shell("echo ready >&3"), says("not that it is here")},
		{"no verdict pipe", proctest.Shell("exec 4<&-; echo here $$ >&3; echo ready >&3; exec sleep 1000"), says("was ready, and died or was stopped")},
		{"a reason", proctest.Shell("echo failed no disk >&3"), says("failed: no disk")},
		{"words without end", proctest.Shell("exec cat /dev/zero >&3"), says(`"\x00\x00`)},
	} {
		t.Run(test.story, func(t *testing.T) {
			upg, _ := NewParent(t, tableflip.Options{Command: test.command}, "fail")
			proctest.OK(t, upg.Ready())
			for range 2 {
				if err := upg.Upgrade(); !test.cause(err) {
					t.Errorf("got %v", err)
				} else if !strings.HasPrefix(err.Error(), "tableflip: ") {
					t.Errorf("%q does not say that it is ours", err)
				}
			}
			if proctest.IsClosed(upg.Exit()) {
				t.Error("Exit is closed")
			}
		})
	}
}

func init() {
	proctest.Role("panic", func() { panic("as told") })
}

// In cloudflare/tableflip v1.2.3 each failed upgrade loses two descriptors until the
// garbage collector finds them.
func TestUpgradeLeaks(t *testing.T) {
	for _, test := range []struct {
		way     string
		command func(*exec.Cmd)
	}{
		{"exits", proctest.Shell("exit 7")},
		{"gives up", proctest.Shell("exec 3>&-; exit 7")},
		{"cannot start", proctest.Unstartable},
		{"hangs", proctest.Shell("exec sleep 1000")},
		{"closes its pipes", proctest.Shell("exec 3>&- 4>&-; exec sleep 1000")},
		{"was refused", func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{os.Stderr} }},
		{"output is copied", func(cmd *exec.Cmd) {
			proctest.Shell("exit 7")(cmd)
			cmd.Stderr = new(strings.Builder)
		}},
	} {
		t.Run(test.way, func(t *testing.T) {
			upg, _ := NewParent(t, tableflip.Options{Command: test.command, UpgradeTimeout: 10 * time.Millisecond}, "fail")
			server, _ := proctest.Connect(t)
			proctest.OK(t, upg.AddConn("tcp", "", server))
			proctest.OK(t, upg.AddFile("a", os.Stderr))
			proctest.OK(t, upg.Ready())
			proctest.WithoutGC(t)
			if err := upg.Upgrade(); err == nil {
				t.Fatal("no error")
			}
			descriptors, goroutines := proctest.OpenDescriptors(), runtime.NumGoroutine()
			for range 5 {
				if err := upg.Upgrade(); err == nil {
					t.Fatal("no error")
				}
			}
			if now := proctest.OpenDescriptors(); now > descriptors {
				t.Errorf("%d descriptors are open after 5 more upgrades, want %d", now, descriptors)
			}
			// Those that have nothing left to do may take their time to end.
			for late := time.Now().Add(proctest.Patience); runtime.NumGoroutine() > goroutines; runtime.Gosched() {
				if time.Now().After(late) {
					t.Fatalf("%d goroutines after 5 more upgrades, want %d", runtime.NumGoroutine(), goroutines)
				}
			}
		})
	}
}

// The connections that a child has claimed are its own, and what it passes on are
// duplicates for the time of the upgrade.
func TestUpgradeLeaksInChild(t *testing.T) {
	ln, err := net.Listen("tcp", "localhost:0")
	proctest.OK(t, err)
	defer ln.Close()
	s, _ := proctest.Start(t, "fail-with-connection", proctest.WithArg(ln.Addr().String()))
	if m := s.Await("leaked"); m.Text != "0" {
		t.Errorf("%s descriptors leaked", m.Text)
	}
}

func init() {
	proctest.Role("fail-with-connection", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{Command: func(cmd *exec.Cmd) {
			if proctest.Arg() == "" {
				proctest.Unstartable(cmd)
			}
			cmd.Env = append(cmd.Env, proctest.WithArg(""))
		}}))
		if proctest.Arg() != "" {
			proctest.Must(0, upg.AddConn("tcp", "a", proctest.Must(net.Dial("tcp", proctest.Arg())).(*net.TCPConn)))
			MustBeReady(upg)
			proctest.Must(0, upg.Upgrade())
			return
		}
		debug.SetGCPercent(-1)
		proctest.Must(upg.Conn("tcp", "a"))
		MustBeReady(upg)
		proctest.Must(0, upg.WaitForParent(context.Background()))
		upg.Upgrade()
		before := proctest.OpenDescriptors()
		for range 5 {
			if !errors.Is(upg.Upgrade(), os.ErrNotExist) {
				panic("no error")
			}
		}
		// There may be one less: that of the pipe that told of the parent's end.
		proctest.Report("leaked", max(0, proctest.OpenDescriptors()-before))
	})
}

// A killed child is no zombie when Upgrade has returned.
func TestChildIsReaped(t *testing.T) {
	var child *exec.Cmd
	upg, _ := NewParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) { child = cmd }}, "hang")
	proctest.OK(t, upg.Ready())
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		restore := proctest.During(t, step.ChildStarted, cancel)
		proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
		restore()
		if !proctest.IsReaped(child.Process.Pid) {
			t.Fatal("the child was not reaped when UpgradeContext returned")
		}
	}
}

// A descendant that holds a copied output open must not hold up the upgrade.
func TestChildIsReapedEarly(t *testing.T) {
	var child *exec.Cmd
	upg, s := NewParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
		proctest.Shell(`sleep 1000 & echo "report $! descendant \"\""; wait`)(cmd)
		cmd.Stderr = new(strings.Builder)
		child = cmd
	}}, "fail")
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancel(t.Context())
	result := proctest.InBackground(func() error { return upg.UpgradeContext(ctx) })
	descendant := s.Await("descendant")
	cancel()
	proctest.WantError(t, "Upgrade", proctest.Within(t, "Upgrade", result), context.Canceled)
	if !proctest.IsReaped(child.Process.Pid) {
		t.Error("the child was not reaped when UpgradeContext returned")
	}
	if err := syscall.Kill(descendant.PID, 0); err != nil {
		t.Errorf("the descendant has ended: %v", err)
	}
}
