//go:build unix

package tableflip_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/handovertest"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

func TestMain(m *testing.M) { proctest.Main(m) }

// New

func TestNewTwice(t *testing.T) {
	first, err := tableflip.New(tableflip.Options{})
	proctest.OK(t, err)
	defer first.Stop()
	for range 2 {
		if _, err := tableflip.New(tableflip.Options{}); err == nil || !strings.Contains(err.Error(), "only a single Upgrader") {
			t.Fatalf("a second New: %v", err)
		}
	}
	first.Stop()
	second, err := tableflip.New(tableflip.Options{})
	if err != nil {
		t.Fatalf("New after Stop: %v", err)
	}
	defer second.Stop()

	// The first one has no say any more.
	first.Stop()
	if third, err := tableflip.New(tableflip.Options{}); err == nil {
		third.Stop()
		t.Error("a second Stop of the old Upgrader made room for a third one")
	}
}

func TestNewAfterUpgrade(t *testing.T) {
	upg, _ := handovertest.NewParent(t, tableflip.Options{}, "succeed")
	handovertest.Upgrade(t, upg)
	if early, err := tableflip.New(tableflip.Options{}); err == nil {
		early.Stop()
		t.Fatal("New before Stop")
	}
	upg.Stop()
	handovertest.NewUpgrader(t, tableflip.Options{}).Stop()
}

func TestNewWithoutParent(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{})
	if upg.HasParent() {
		t.Error("HasParent")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := upg.WaitForParent(ctx); err != nil {
		t.Errorf("WaitForParent: %v", err)
	}
}

// Ready

func TestReadyAgain(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "ready-many-times")
	for range 3 {
		proctest.OK(t, upg.Ready())
	}
	proctest.OK(t, upg.Upgrade())
	for range 6 {
		if m := s.Await("ready"); m.Text != "<nil>" {
			t.Errorf("Ready in the child: %s", m.Text)
		}
	}
	if err := upg.Ready(); err != nil {
		t.Errorf("Ready after the upgrade: %v", err)
	}
}

func init() {
	proctest.Role("ready-many-times", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() { proctest.Report("ready", upg.Ready()) })
		}
		all.Wait()
		for range 3 {
			proctest.Report("ready", upg.Ready())
		}
	})
}

func TestReadyAfterStop(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	upg := handovertest.NewUpgrader(t, tableflip.Options{PIDFile: path})
	upg.Stop()
	proctest.WantError(t, "Ready", upg.Ready(), tableflip.ErrStopped)
	proctest.WantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrStopped)
	if proctest.Exists(path) {
		t.Error("Ready wrote the PID file after Stop")
	}
}

// Upgrade

func TestUpgrade(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "answer")
	ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	handovertest.Upgrade(t, upg)
	<-upg.Exit()
	child := s.Await("ready")
	if child.Text != "true" {
		t.Errorf("HasParent in the child: %s", child.Text)
	}
	if got := proctest.Answer(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.PID) {
		t.Errorf("the answer is %q, want %d", got, child.PID)
	}
	s.AwaitEnd()
}

func TestUpgradeFails(t *testing.T) {
	upg, _ := handovertest.NewParent(t, tableflip.Options{}, "fail")
	proctest.OK(t, upg.Ready())
	var exit *exec.ExitError
	if err := upg.Upgrade(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("got %v, want exit status 7", err)
	}
}

// In cloudflare/tableflip v1.2.3 a process is ready only some time after Ready.
func TestUpgradeAfterReady(t *testing.T) {
	for range 500 {
		upg := handovertest.NewUpgrader(t, tableflip.Options{Command: proctest.Unstartable})
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := upg.Ready(); err != nil {
				t.Error(err)
			}
		}()
		<-done
		proctest.WantError(t, "Upgrade", upg.Upgrade(), os.ErrNotExist)
		upg.Stop()
		if t.Failed() {
			return
		}
	}
}

func TestUpgradeBeforeReady(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{Command: func(*exec.Cmd) { t.Error("Command was called") }})
	proctest.WantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrNotReady)
}

func TestUpgradeInProgress(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "hang")
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancel(t.Context())
	first := proctest.InBackground(func() error { return upg.UpgradeContext(ctx) })
	s.Await("hanging")
	proctest.WantError(t, "a second Upgrade", upg.Upgrade(), tableflip.ErrUpgradeInProgress)
	cancel()
	proctest.WantError(t, "the first Upgrade", proctest.Within(t, "Upgrade", first), context.Canceled)
}

func TestUpgradeBesideParent(t *testing.T) {
	s, cmd := proctest.Start(t, "three-generations")
	if first := s.Await("ready"); first.PID != cmd.Process.Pid || first.Text != "false" {
		t.Fatalf("the first generation is %v, want %d", first, cmd.Process.Pid)
	}
	second := s.Await("ready")
	if m := s.Await("Upgrade"); m.PID != second.PID || m.Text != tableflip.ErrParentRunning.Error() {
		t.Errorf("Upgrade beside the parent: %s, want %v", m.Text, tableflip.ErrParentRunning)
	}
	if m := s.Await("WaitForParent"); m.Text != "timeout" {
		t.Errorf("WaitForParent did not wait: %s", m.Text)
	}
	proctest.Terminate(t, cmd.Process.Pid)
	if m := s.Await("WaitForParent"); m.Text != "<nil>" {
		t.Errorf("WaitForParent: %s", m.Text)
	}
	if third := s.Await("ready"); third.PID == second.PID || third.Text != "true" {
		t.Errorf("the third generation is %v", third)
	}
}

func init() {
	proctest.Role("three-generations", func() {
		terminated := proctest.Terminated()
		generation, _ := strconv.Atoi(proctest.Arg())
		proctest.SetArg(strconv.Itoa(generation + 1))
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		handovertest.MustBeReady(upg)
		proctest.Report("ready", upg.HasParent())
		switch generation {
		case 0:
			proctest.Must(0, upg.Upgrade())
			<-terminated
		case 1:
			proctest.Report("Upgrade", upg.Upgrade())
			ctx, cancel := context.WithTimeoutCause(context.Background(), time.Millisecond, errors.New("timeout"))
			defer cancel()
			proctest.Report("WaitForParent", errors.Unwrap(upg.WaitForParent(ctx)))
			proctest.Report("WaitForParent", upg.WaitForParent(context.Background()))
			proctest.Must(0, upg.Upgrade())
		}
	})
}

func TestUpgradeTwice(t *testing.T) {
	upg, _ := handovertest.NewParent(t, tableflip.Options{}, "succeed")
	proctest.OK(t, upg.Ready())
	if proctest.IsClosed(upg.Exit()) {
		t.Fatal("Exit is closed before the upgrade")
	}
	proctest.OK(t, upg.Upgrade())
	if !proctest.IsClosed(upg.Exit()) {
		t.Error("Exit is open when Upgrade has returned")
	}
	proctest.WantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrUpgraded)
	upg.Stop()
	proctest.WantError(t, "Upgrade after Stop", upg.Upgrade(), tableflip.ErrUpgraded)
	if err := upg.Ready(); err != nil {
		t.Errorf("Ready: %v", err)
	}
}

func TestUpgradeTimeout(t *testing.T) {
	var child *exec.Cmd
	upg, _ := handovertest.NewParent(t, tableflip.Options{
		UpgradeTimeout: time.Millisecond,
		Command:        func(cmd *exec.Cmd) { child = cmd },
	}, "hang")
	proctest.OK(t, upg.Ready())
	err := upg.Upgrade()
	proctest.WantError(t, "Upgrade", err, os.ErrDeadlineExceeded)
	if err != nil && !strings.Contains(err.Error(), "1ms") {
		t.Errorf("%q does not say how long it has waited", err)
	}
	if !proctest.IsReaped(child.Process.Pid) {
		t.Error("the child was not reaped when Upgrade returned")
	}
}

func TestUpgradeTimeoutZero(t *testing.T) {
	if tableflip.DefaultUpgradeTimeout != time.Minute {
		t.Errorf("DefaultUpgradeTimeout is %v", tableflip.DefaultUpgradeTimeout)
	}
	for _, timeout := range []time.Duration{0, -1} {
		upg, _ := handovertest.NewParent(t, tableflip.Options{UpgradeTimeout: timeout}, "succeed")
		proctest.OK(t, upg.Ready())
		if err := upg.Upgrade(); err != nil {
			t.Errorf("with UpgradeTimeout %d: %v", timeout, err)
		}
		upg.Stop()
	}
}

// The deadline of a context takes the place of the timeout, be it earlier or later.
func TestUpgradeDeadline(t *testing.T) {
	t.Run("later", func(t *testing.T) {
		upg, _ := handovertest.NewParent(t, tableflip.Options{UpgradeTimeout: 1}, "succeed")
		proctest.OK(t, upg.Ready())
		ctx, cancel := context.WithTimeout(t.Context(), proctest.Patience)
		defer cancel()
		if err := upg.UpgradeContext(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Run("earlier", func(t *testing.T) {
		upg, _ := handovertest.NewParent(t, tableflip.Options{UpgradeTimeout: proctest.Patience}, "hang")
		proctest.OK(t, upg.Ready())
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		proctest.WantError(t, "UpgradeContext", upg.UpgradeContext(ctx), context.DeadlineExceeded)
	})
}

func TestUpgradeCancelled(t *testing.T) {
	because := errors.New("because")
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "hang")
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancelCause(t.Context())
	result := proctest.InBackground(func() error { return upg.UpgradeContext(ctx) })
	hanging := s.Await("hanging")
	cancel(because)
	proctest.WantError(t, "UpgradeContext", proctest.Within(t, "Upgrade", result), because)
	if !proctest.IsReaped(hanging.PID) {
		t.Error("the child was not reaped when UpgradeContext returned")
	}
	if proctest.IsClosed(upg.Exit()) {
		t.Error("Exit is closed")
	}
}

func TestUpgradeCancelledEarly(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{Command: func(*exec.Cmd) { t.Error("Command was called") }})
	proctest.OK(t, upg.Ready())
	because := errors.New("because")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(because)
	proctest.WantError(t, "UpgradeContext", upg.UpgradeContext(ctx), because)
}

// A cancellation that comes after the child's word, and before the commit, counts.
func TestUpgradeCancelledLate(t *testing.T) {
	var child *exec.Cmd
	upg, s := handovertest.NewParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) { child = cmd }}, "succeed")
	proctest.OK(t, upg.Ready())
	for range 5 {
		ctx, cancel := context.WithCancel(t.Context())
		restore := proctest.During(t, step.ReadyReceived, cancel)
		proctest.WantError(t, "UpgradeContext", upg.UpgradeContext(ctx), context.Canceled)
		restore()
		if !proctest.IsReaped(child.Process.Pid) {
			t.Error("the child was not reaped")
		}
	}
	if err := upg.Upgrade(); err != nil {
		t.Fatalf("the next upgrade: %v", err)
	}
	if m := s.Await("ready"); m.PID != child.Process.Pid {
		t.Errorf("%d is ready, want %d", m.PID, os.Getpid())
	}
}

// The context of an upgrade that has succeeded has no meaning any more.
func TestUpgradeCancelledAfter(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "answer")
	ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancel(t.Context())
	proctest.OK(t, upg.UpgradeContext(ctx))
	cancel()
	upg.Stop()
	child := s.Await("ready")
	if got := proctest.Answer(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.PID) {
		t.Errorf("the answer is %q, want %d", got, child.PID)
	}
}

// Stop

func TestStopDuringUpgrade(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "hang")
	proctest.OK(t, upg.Ready())
	result := proctest.InBackground(upg.Upgrade)
	hanging := s.Await("hanging")
	upg.Stop()
	if !proctest.IsReaped(hanging.PID) {
		t.Error("the child was not reaped when Stop returned")
	}
	if !proctest.IsClosed(upg.Exit()) {
		t.Error("Exit is open when Stop has returned")
	}
	proctest.WantError(t, "Upgrade", proctest.Within(t, "Upgrade", result), tableflip.ErrStopped)
	proctest.WantError(t, "the next Upgrade", upg.Upgrade(), tableflip.ErrStopped)
}

// A child that has not called New yet is not to blame for the end of the upgrade.
func TestStopBeforeNew(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{
		Command: proctest.Shell(`echo "report $$ started \"\""; exec sleep 1000`),
	}, "hang")
	proctest.OK(t, upg.Ready())
	result := proctest.InBackground(upg.Upgrade)
	s.Await("started")
	upg.Stop()
	if err := proctest.Within(t, "Upgrade", result); err != tableflip.ErrStopped {
		t.Errorf("Upgrade: got %v, want %v and no more words", err, tableflip.ErrStopped)
	}
}

func TestStopAtAnyTime(t *testing.T) {
	for _, test := range []struct{ before, role string }{
		{"New", "fail"},
		{"Ready", "fail"},
		{"failed upgrade", "fail"},
		{"upgrade under way", "hang"},
		{"upgrade", "succeed"},
	} {
		t.Run("after "+test.before, func(t *testing.T) {
			upg, s := handovertest.NewParent(t, tableflip.Options{}, test.role)
			if test.before != "New" {
				proctest.OK(t, upg.Ready())
			}
			var result <-chan error
			switch test.before {
			case "upgrade under way":
				result = proctest.InBackground(upg.Upgrade)
				s.Await("hanging")
			case "failed upgrade", "upgrade":
				if err := upg.Upgrade(); (err == nil) != (test.role == "succeed") {
					t.Fatal(err)
				}
			}
			var all sync.WaitGroup
			for range 8 {
				all.Go(func() {
					upg.Stop()
					if !proctest.IsClosed(upg.Exit()) {
						t.Error("Exit is open when Stop has returned")
					}
				})
			}
			proctest.Within(t, "Stop", proctest.Waited(&all))
			if result != nil {
				proctest.WantError(t, "Upgrade", proctest.Within(t, "Upgrade", result), tableflip.ErrStopped)
			}
			handovertest.NewUpgrader(t, tableflip.Options{}).Stop()
		})
	}
}

// Whoever waits for Exit and then ends the process must leave no socket behind.
func TestStopUnlinks(t *testing.T) {
	dir := proctest.SocketDir(t)
	for range 20 {
		upg := handovertest.NewUpgrader(t, tableflip.Options{PIDFile: filepath.Join(dir, "pid")})
		var paths []string
		for i := range 10 {
			path := filepath.Join(dir, strconv.Itoa(i))
			ln, err := upg.Listen("unix", path)
			proctest.OK(t, err)
			// Another generation may need the file that this one has closed.
			ln.Close()
			if !proctest.Exists(path) {
				t.Fatal("Close has unlinked the socket")
			}
			conn, err := upg.ListenPacket("unixgram", path+"gram")
			proctest.OK(t, err)
			defer conn.Close()
			paths = append(paths, path, path+"gram")
		}
		proctest.OK(t, upg.Ready())
		left := proctest.InBackground(func() []string {
			<-upg.Exit()
			left, _ := filepath.Glob(filepath.Join(dir, "*"))
			return left
		})
		upg.Stop()
		if left := slices.DeleteFunc(paths, func(path string) bool { return !proctest.Exists(path) }); len(left) > 0 {
			t.Errorf("left when Stop has returned: %v", left)
		}
		if left := proctest.Within(t, "Exit", left); len(left) > 0 {
			t.Errorf("left when Exit was closed: %v", left)
		}
		if t.Failed() {
			return
		}
	}
}

// WaitForParent

func TestWaitForParent(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "impatient")
	handovertest.Upgrade(t, upg)
	for _, moment := range []string{"before-Ready", "after-Ready"} {
		if m := s.Await(moment); m.Text != "true" {
			t.Errorf("WaitForParent %s did not return its context's cause", moment)
		}
	}
}

func init() {
	proctest.Role("impatient", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		because := errors.New("because")
		wait := func() bool {
			// Many times, because it also waits for the verdict, and selects at random.
			for range 20 {
				ctx, cancel := context.WithCancelCause(context.Background())
				result := proctest.InBackground(func() error { return upg.WaitForParent(ctx) })
				cancel(because)
				if !errors.Is(<-result, because) {
					return false
				}
			}
			return true
		}
		proctest.Report("before-Ready", wait())
		handovertest.MustBeReady(upg)
		proctest.Report("after-Ready", wait())
	})
}

// Options

func TestCommand(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	proctest.OK(t, err)
	other := filepath.Join(dir, "other")
	proctest.OK(t, os.Symlink(proctest.Must(os.Executable()), other))
	output, err := os.Create(filepath.Join(dir, "output"))
	proctest.OK(t, err)
	defer output.Close()
	calls := 0
	upg, s := handovertest.NewParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
		calls++
		if !os.SameFile(proctest.Must(os.Stat(cmd.Path)), proctest.Must(os.Stat(os.Args[0]))) {
			t.Errorf("Path is %q, want %q", cmd.Path, os.Args[0])
		}
		cmd.Path = other
		cmd.Args = []string{"argument zero", "argument one"}
		cmd.Env = append(cmd.Env, proctest.WithArg("value"))
		cmd.Dir = dir
		cmd.Stderr = output
	}}, "describe")
	handovertest.Upgrade(t, upg)
	if calls != 1 {
		t.Errorf("Command was called %d times", calls)
	}
	want := fmt.Sprintf(`["argument zero" "argument one"] %s value`, dir)
	if got := s.Await("described").Text; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	s.AwaitEnd()
	if content, err := os.ReadFile(output.Name()); string(content) != "to standard error\n" {
		t.Errorf("the output is %q, %v", content, err)
	}
}

func init() {
	proctest.Role("describe", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		fmt.Fprintln(os.Stderr, "to standard error")
		handovertest.MustBeReady(upg)
		proctest.Report("described", fmt.Sprintf("%q", os.Args), proctest.Must(os.Getwd()), proctest.Arg())
	})
}

// The PID file

func TestPIDFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	wantContent := func(when string, pid int) {
		t.Helper()
		if content, err := os.ReadFile(path); string(content) != strconv.Itoa(pid) {
			t.Errorf("%s: the PID file holds %q, %v, want %d", when, content, err, pid)
		}
	}
	upg, s := handovertest.NewParent(t, tableflip.Options{PIDFile: path}, "with-pid-file", proctest.WithArg(path))
	if proctest.Exists(path) {
		t.Error("there is a PID file before Ready")
	}
	proctest.OK(t, upg.Ready())
	wantContent("after Ready", os.Getpid())

	ctx, cancel := context.WithCancel(t.Context())
	restore := proctest.During(t, step.ReadyReceived, func() {
		wantContent("before the commit", os.Getpid())
		cancel()
	})
	proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	restore()
	wantContent("after a failed upgrade", os.Getpid())
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*")); len(left) != 1 {
		t.Errorf("beside the PID file: %v", left)
	}

	proctest.OK(t, upg.Upgrade())
	inCharge := s.Await("ready").PID
	wantContent("after the upgrade", inCharge)
	upg.Stop()
	wantContent("after the parent's Stop", inCharge)
	proctest.Terminate(t, inCharge)
	s.AwaitEnd()
	if proctest.Exists(path) {
		t.Error("the PID file is there after the child's Stop")
	}
}

func init() {
	proctest.Role("with-pid-file", func() {
		terminated := proctest.Terminated()
		upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: proctest.Arg()}))
		handovertest.MustBeReady(upg)
		proctest.Report("ready")
		<-terminated
		upg.Stop()
	})
}

func TestPIDFileMode(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o077} {
		path := filepath.Join(t.TempDir(), "pid")
		before := syscall.Umask(umask)
		upg, err := tableflip.New(tableflip.Options{PIDFile: path})
		if err == nil {
			err = upg.Ready()
		}
		syscall.Umask(before)
		proctest.OK(t, err)
		info, err := os.Stat(path)
		proctest.OK(t, err)
		if got, want := info.Mode(), os.FileMode(0o644&^umask); got != want {
			t.Errorf("mode %v with umask %03o, want %v", got, umask, want)
		}
		upg.Stop()
	}
}

func TestPIDFileOfAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	upg := handovertest.NewUpgrader(t, tableflip.Options{PIDFile: path})
	proctest.OK(t, upg.Ready())
	proctest.OK(t, os.WriteFile(path, []byte("1"), 0o600))
	upg.Stop()
	if content, err := os.ReadFile(path); string(content) != "1" {
		t.Errorf("the PID file holds %q, %v", content, err)
	}
}

func TestPIDFileReadyAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	upg := handovertest.NewUpgrader(t, tableflip.Options{PIDFile: filepath.Join(dir, "pid"), Command: proctest.Unstartable})
	proctest.WantError(t, "Ready", upg.Ready(), os.ErrNotExist)
	proctest.WantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrNotReady)
	proctest.OK(t, os.Mkdir(dir, 0o700))
	proctest.OK(t, upg.Ready())
	proctest.WantError(t, "Upgrade", upg.Upgrade(), os.ErrNotExist)
}

// The parent has not heard that its child is ready if that failed.
func TestPIDFileChildAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "ready-later", proctest.WithArg(dir))
	handovertest.Upgrade(t, upg)
	if m := s.Await("ready"); m.Text != "true <nil>" {
		t.Errorf("Ready without a directory, and with one: %s", m.Text)
	}
}

func init() {
	proctest.Role("ready-later", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: filepath.Join(proctest.Arg(), "pid")}))
		first := upg.Ready()
		proctest.Must(0, os.Mkdir(proctest.Arg(), 0o700))
		proctest.Report("ready", errors.Is(first, os.ErrNotExist), upg.Ready())
	})
}

// Without a PID file before the upgrade there is none after it failed.
func TestPIDFileWasMissing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	upg, _ := handovertest.NewParent(t, tableflip.Options{PIDFile: path}, "with-pid-file", proctest.WithArg(path))
	proctest.OK(t, upg.Ready())
	proctest.OK(t, os.Remove(path))
	ctx, cancel := context.WithCancel(t.Context())
	proctest.During(t, step.ReadyReceived, func() {
		if !proctest.Exists(path + ".tmp") {
			t.Error("the child has prepared no PID file")
		}
		cancel()
	})
	proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	if proctest.Exists(path) || proctest.Exists(path+".tmp") {
		t.Error("the dead child's PID file is there")
	}
}

// The logger

func TestLoggerChildDies(t *testing.T) {
	logger, lines := proctest.NewLogger()
	upg, s := handovertest.NewParent(t, tableflip.Options{Logger: logger}, "ready-then-fail")
	handovertest.Upgrade(t, upg)
	child := s.Await("ready")
	proctest.Terminate(t, child.PID)
	line := lines.Await(t, "level=WARN")
	for _, want := range []string{"tableflip: ", "started=" + strconv.Itoa(child.PID), "ready=" + strconv.Itoa(child.PID), "exit status 5"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q lacks %q", line, want)
		}
	}
}

func init() {
	proctest.Role("ready-then-fail", func() {
		terminated := proctest.Terminated()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		handovertest.MustBeReady(upg)
		proctest.Report("ready")
		<-terminated
		os.Exit(5)
	})
}

func TestLoggerPIDFile(t *testing.T) {
	logger, lines := proctest.NewLogger()
	path := filepath.Join(t.TempDir(), "pid")
	upg, _ := handovertest.NewParent(t, tableflip.Options{Logger: logger, PIDFile: path}, "hang")
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancel(t.Context())
	proctest.During(t, step.ChildStarted, func() {
		// A directory is not replaced by a file.
		if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
			t.Error(err)
		}
		cancel()
	})
	proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	if line := lines.Await(t, "PID file"); !strings.Contains(line, "level=ERROR") {
		t.Errorf("got %q", line)
	}
}

func TestReplaced(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "ready-then-fail")
	proctest.OK(t, upg.Ready())
	if upg.Replaced() {
		t.Error("replaced before an upgrade")
	}
	proctest.OK(t, upg.Upgrade())
	proctest.Terminate(t, s.Await("ready").PID)
	if !upg.Replaced() {
		t.Error("not replaced by an upgrade")
	}
	upg.Stop()
	if !upg.Replaced() {
		t.Error("not replaced after Stop")
	}

	stopped, _ := handovertest.NewParent(t, tableflip.Options{}, "ready-then-fail")
	proctest.OK(t, stopped.Ready())
	stopped.Stop()
	if stopped.Replaced() {
		t.Error("replaced by Stop")
	}
}
