//go:build unix

package tableflip_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/step"
)

// argVariable holds what a test has to tell a role: a path, names, which of its
// ways to go.
const argVariable = "TABLEFLIP_TEST_ARG"

func arg() string { return os.Getenv(argVariable) }

func withArg(value string) string { return argVariable + "=" + value }

// untilKilled keeps a role's process alive.
func untilKilled() {
	<-terminated()
}

// terminated is for roles that are ended by SIGTERM. It is to be called before
// the test can know of the process.
func terminated() <-chan os.Signal {
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM)
	return terminate
}

func terminate(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
}

// mustBeReady is ready, for roles.
func mustBeReady(upg *tableflip.Upgrader) {
	if err := upg.Ready(); err != nil {
		panic(err)
	}
}

// unstartable makes an Upgrade fail with os.ErrNotExist, without a process.
func unstartable(cmd *exec.Cmd) { cmd.Path = "/nonexistent/binary" }

// wrap has a shell run script, to which the new process is "$0".
func wrap(script string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		cmd.Args = append([]string{"sh", "-c", script, cmd.Path}, cmd.Args[1:]...)
		cmd.Path = "/bin/sh"
	}
}

// when has this process call hook at a step of a handover.
func when(at step.Step, hook func()) (restore func()) {
	before := step.SetHook(nil)
	step.SetHook(func(reached step.Step) {
		if before != nil {
			before(reached)
		}
		if reached == at {
			hook()
		}
	})
	return func() { step.SetHook(before) }
}

// during is when, for tests. No upgrade may be under way when the test ends.
func during(t *testing.T, at step.Step, hook func()) {
	t.Helper()
	t.Cleanup(when(at, hook))
}

// openDescriptors counts the descriptors of this process. Counts are compared
// withoutGC, which would close lost ones.
func openDescriptors() int {
	open := 0
	for fd := range 1024 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			open++
		}
	}
	return open
}

func withoutGC(t *testing.T) {
	t.Helper()
	runtime.GC()
	percent := debug.SetGCPercent(-1)
	t.Cleanup(func() { debug.SetGCPercent(percent) })
}

// reaped reports whether this process no longer has a child pid, not even a
// zombie.
func reaped(pid int) bool {
	_, err := syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
	return errors.Is(err, syscall.ECHILD)
}

// A logbook is where a Logger writes, one line a message.
type logbook chan string

func newLogger() (*slog.Logger, logbook) {
	lines := make(logbook, 1000)
	return slog.New(slog.NewTextHandler(lines, nil)), lines
}

func (l logbook) Write(line []byte) (int, error) {
	l <- string(line)
	return len(line), nil
}

// within waits for an event in this process.
func within[T any](t *testing.T, what string, event <-chan T) T {
	t.Helper()
	select {
	case value := <-event:
		return value
	case <-time.After(patience):
		t.Fatalf("waited in vain for %s", what)
		panic("unreachable")
	}
}

// inBackground returns the result of call once it has it.
func inBackground[T any](call func() T) <-chan T {
	result := make(chan T, 1)
	go func() { result <- call() }()
	return result
}

func waited(all *sync.WaitGroup) <-chan bool {
	return inBackground(func() bool { all.Wait(); return true })
}

func wantError(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func isClosed[T any](c <-chan T) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// socketDir is a directory whose path is short enough for Unix sockets in it,
// unlike that of t.TempDir.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "flip")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// answerOf returns what a server says until it closes the connection.
func answerOf(t *testing.T, network, addr string) string {
	t.Helper()
	conn, err := net.Dial(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Errorf("%s %s: %v", network, addr, err)
	}
	return string(answer)
}

func init() {
	// answer serves its own PID on the listener that it inherits, once.
	roles["answer"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		ln := must(upg.Listener("tcp", "localhost:0"))
		mustBeReady(upg)
		report("ready", upg.HasParent())
		conn := must(ln.Accept())
		must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
		conn.Close()
	}
	// succeed becomes ready and exits.
	roles["succeed"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		mustBeReady(upg)
		report("ready")
	}
	roles["fail"] = func() { os.Exit(7) }
	// hang never becomes ready.
	roles["hang"] = func() {
		must(tableflip.New(tableflip.Options{}))
		report("hanging")
		untilKilled()
	}
}

func TestUpgradeHandsListenerOver(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "answer")
	ln, err := upg.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	<-upg.Exit()
	child := s.await("ready")
	if child.text != "true" {
		t.Errorf("HasParent in the child: %s", child.text)
	}
	if got := answerOf(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.pid) {
		t.Errorf("the answer is %q, want %d", got, child.pid)
	}
	s.awaitEnd()
}

func TestUpgradeFailsWithExitError(t *testing.T) {
	upg, _ := newParent(t, tableflip.Options{}, "fail")
	ready(t, upg)
	var exit *exec.ExitError
	if err := upg.Upgrade(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("got %v, want exit status 7", err)
	}
}

// New

func TestOnlyOneUpgraderAtATime(t *testing.T) {
	first, err := tableflip.New(tableflip.Options{})
	if err != nil {
		t.Fatal(err)
	}
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

func TestNewAfterAnUpgradeWorksOnceStopWasCalled(t *testing.T) {
	upg, _ := newParent(t, tableflip.Options{}, "succeed")
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	if early, err := tableflip.New(tableflip.Options{}); err == nil {
		early.Stop()
		t.Fatal("New before Stop")
	}
	upg.Stop()
	again, err := tableflip.New(tableflip.Options{})
	if err != nil {
		t.Fatal(err)
	}
	again.Stop()
}

func TestFirstGenerationHasNoParent(t *testing.T) {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer upg.Stop()
	if upg.HasParent() {
		t.Error("HasParent")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := upg.WaitForParent(ctx); err != nil {
		t.Errorf("WaitForParent: %v", err)
	}
}

// In a child whose environment was garbled New must fail each time: a process
// that took itself for a first generation would bind what its parent has.
func TestGarbledEnvironmentFailsEveryNew(t *testing.T) {
	for _, test := range []struct {
		story, script string
		want          []string
	}{
		{"garbage", `TABLEFLIP_HANDOVER=garbage exec "$0"`, []string{"TABLEFLIP_HANDOVER", "garbled"}},
		{"empty", `TABLEFLIP_HANDOVER= exec "$0"`, []string{"TABLEFLIP_HANDOVER", "garbled"}},
		{"header missing", `unset TABLEFLIP_HANDOVER; exec "$0"`, []string{"TABLEFLIP_HANDOVER", "garbled"}},
		{"names missing", `unset TABLEFLIP_HANDOVER_0; exec "$0"`, []string{"TABLEFLIP_HANDOVER_0", "missing"}},
		{"names cut", `TABLEFLIP_HANDOVER_0=${TABLEFLIP_HANDOVER_0%;*} exec "$0"`, []string{"3 descriptors announced, 2 found"}},
		// So many that they are not all taken by what the runtime opens.
		{"descriptors missing", `set -- "$0" $TABLEFLIP_HANDOVER
			for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do more="$more;fd,missing"; done
			TABLEFLIP_HANDOVER="$2 $3 $4 23 1" TABLEFLIP_HANDOVER_0="$TABLEFLIP_HANDOVER_0$more" exec "$0"`,
			[]string{"inherit descriptor", `"fd:missing:"`}},
		{"newer version", `TABLEFLIP_HANDOVER="27${TABLEFLIP_HANDOVER#1}" exec "$0"`, []string{`"27"`, `"1"`}},
		{"newer version with more fields", `TABLEFLIP_HANDOVER="27${TABLEFLIP_HANDOVER#1} and more" exec "$0"`, []string{`"27"`, `"1"`}},
	} {
		t.Run(test.story, func(t *testing.T) {
			upg, s := newParent(t, tableflip.Options{Command: wrap(test.script)}, "new-twice")
			for _, fileName := range []string{"first", "second", "third"} {
				if err := upg.AddFile(fileName, os.Stderr); err != nil {
					t.Fatal(err)
				}
			}
			ready(t, upg)
			var exit *exec.ExitError
			if err := upg.Upgrade(); !errors.As(err, &exit) {
				t.Errorf("Upgrade: %v", err)
			}
			first, second := s.await("new").text, s.await("new").text
			for _, want := range append(test.want, "tableflip: ") {
				if !strings.Contains(first, want) {
					t.Errorf("New: %q lacks %q", first, want)
				}
			}
			if second != first {
				t.Errorf("the second New: %s\nwant what the first said: %s", second, first)
			}
			if environment := s.await("environment").text; environment != "[]" {
				t.Errorf("left in the environment: %s", environment)
			}
		})
	}
}

func init() {
	roles["new-twice"] = func() {
		for range 2 {
			_, err := tableflip.New(tableflip.Options{})
			report("new", err)
		}
		report("environment", handoverVariables())
		os.Exit(1)
	}
}

// handoverVariables returns what the environment holds of a handover.
func handoverVariables() []string {
	return slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return !strings.HasPrefix(variable, "TABLEFLIP_") || strings.HasPrefix(variable, "TABLEFLIP_TEST_")
	})
}

// Ready

func TestReadyTellsItsFirstResultAgain(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "ready-many-times")
	for range 3 {
		ready(t, upg)
	}
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	for range 6 {
		if m := s.await("ready"); m.text != "<nil>" {
			t.Errorf("Ready in the child: %s", m.text)
		}
	}
	if err := upg.Ready(); err != nil {
		t.Errorf("Ready after the upgrade: %v", err)
	}
}

func init() {
	roles["ready-many-times"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() { report("ready", upg.Ready()) })
		}
		all.Wait()
		for range 3 {
			report("ready", upg.Ready())
		}
	}
}

func TestReadyFailsAfterStop(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	upg, err := tableflip.New(tableflip.Options{PIDFile: path})
	if err != nil {
		t.Fatal(err)
	}
	upg.Stop()
	wantError(t, "Ready", upg.Ready(), tableflip.ErrStopped)
	wantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrStopped)
	if exists(path) {
		t.Error("Ready wrote the PID file after Stop")
	}
}

// A child that has said that it is ready when its Stop is called must not be put
// in charge.
func TestStopEndsAChildsWaitInReady(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg, s := newParent(t, tableflip.Options{}, "stop-in-ready", withArg(path))
	if _, err := upg.Listen("unix", path); err != nil {
		t.Fatal(err)
	}
	ready(t, upg)
	during(t, step.ReadyReceived, func() {
		if m := s.await("ready"); m.text != "true" {
			t.Error("Ready did not return ErrStopped in the child")
		}
	})
	if err := upg.Upgrade(); err == nil {
		t.Error("the child was put in charge")
	}
	if isClosed(upg.Exit()) || !exists(path) {
		t.Error("the parent is no longer in charge")
	}
}

func init() {
	roles["stop-in-ready"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		must(upg.Listen("unix", arg()))
		stopped := make(chan struct{})
		when(step.ReadySaid, func() {
			go func() {
				upg.Stop()
				close(stopped)
			}()
		})
		err := upg.Ready()
		<-stopped
		report("ready", errors.Is(err, tableflip.ErrStopped))
		untilKilled()
	}
}

// The wrapper is killed, and the child that was refused lives on: it must hear
// of it, and touch nothing.
func TestRefusedChildIsTold(t *testing.T) {
	dir := socketDir(t)
	path, pidFile := filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	upg, s := newParent(t, tableflip.Options{
		Command: wrap(`"$0" & wait`),
		PIDFile: pidFile,
	}, "refused", withArg(dir))
	if _, err := upg.Listen("unix", path); err != nil {
		t.Fatal(err)
	}
	ready(t, upg)
	ctx, cancel := context.WithCancel(t.Context())
	during(t, step.ReadyReceived, cancel)
	wantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	first := s.await("Ready").text
	if !strings.Contains(first, "aborted") {
		t.Errorf("Ready: %s", first)
	}
	for _, call := range []string{"Ready-again", "WaitForParent"} {
		if m := s.await(call); m.text != first {
			t.Errorf("%s: %s, want %s", call, m.text, first)
		}
	}
	if m := s.await("Upgrade"); m.text != tableflip.ErrNotReady.Error() {
		t.Errorf("Upgrade: %s", m.text)
	}
	s.awaitEnd()
	if !exists(path) {
		t.Error("the refused child has unlinked its parent's socket")
	}
	if content, err := os.ReadFile(pidFile); string(content) != strconv.Itoa(os.Getpid()) {
		t.Errorf("the PID file holds %q, %v", content, err)
	}
}

func init() {
	roles["refused"] = func() {
		upg := must(tableflip.New(tableflip.Options{PIDFile: filepath.Join(arg(), "pid")}))
		must(upg.Listen("unix", filepath.Join(arg(), "s")))
		report("Ready", upg.Ready())
		report("Ready-again", upg.Ready())
		report("WaitForParent", upg.WaitForParent(context.Background()))
		report("Upgrade", upg.Upgrade())
		upg.Stop()
	}
}

// Upgrade

// Elsewhere a process is ready only some time after Ready.
func TestUpgradeIsAcceptedOnceReadyHasReturned(t *testing.T) {
	for range 500 {
		upg, err := tableflip.New(tableflip.Options{Command: unstartable})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := upg.Ready(); err != nil {
				t.Error(err)
			}
		}()
		<-done
		wantError(t, "Upgrade", upg.Upgrade(), os.ErrNotExist)
		upg.Stop()
		if t.Failed() {
			return
		}
	}
}

func TestUpgradeNeedsReady(t *testing.T) {
	upg, err := tableflip.New(tableflip.Options{Command: func(*exec.Cmd) { t.Error("Command was called") }})
	if err != nil {
		t.Fatal(err)
	}
	defer upg.Stop()
	wantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrNotReady)
}

func TestOneUpgradeAtATime(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "hang")
	ready(t, upg)
	ctx, cancel := context.WithCancel(t.Context())
	first := inBackground(func() error { return upg.UpgradeContext(ctx) })
	s.await("hanging")
	wantError(t, "a second Upgrade", upg.Upgrade(), tableflip.ErrUpgradeInProgress)
	cancel()
	wantError(t, "the first Upgrade", within(t, "Upgrade", first), context.Canceled)
}

func TestUpgradeWaitsForTheParentToExit(t *testing.T) {
	s, cmd := startService(t, "three-generations")
	if first := s.await("ready"); first.pid != cmd.Process.Pid || first.text != "false" {
		t.Fatalf("the first generation is %v, want %d", first, cmd.Process.Pid)
	}
	second := s.await("ready")
	if m := s.await("Upgrade"); m.pid != second.pid || m.text != tableflip.ErrParentRunning.Error() {
		t.Errorf("Upgrade beside the parent: %s, want %v", m.text, tableflip.ErrParentRunning)
	}
	if m := s.await("WaitForParent"); m.text != "timeout" {
		t.Errorf("WaitForParent did not wait: %s", m.text)
	}
	terminate(t, cmd.Process.Pid)
	if m := s.await("WaitForParent"); m.text != "<nil>" {
		t.Errorf("WaitForParent: %s", m.text)
	}
	if third := s.await("ready"); third.pid == second.pid || third.text != "true" {
		t.Errorf("the third generation is %v", third)
	}
}

func init() {
	roles["three-generations"] = func() {
		terminated := terminated()
		generation, _ := strconv.Atoi(arg())
		os.Setenv(argVariable, strconv.Itoa(generation+1))
		upg := must(tableflip.New(tableflip.Options{}))
		mustBeReady(upg)
		report("ready", upg.HasParent())
		switch generation {
		case 0:
			must(0, upg.Upgrade())
			<-terminated
		case 1:
			report("Upgrade", upg.Upgrade())
			ctx, cancel := context.WithTimeoutCause(context.Background(), time.Millisecond, errors.New("timeout"))
			defer cancel()
			report("WaitForParent", errors.Unwrap(upg.WaitForParent(ctx)))
			report("WaitForParent", upg.WaitForParent(context.Background()))
			must(0, upg.Upgrade())
		}
	}
}

func TestUpgradedProcessRefusesAll(t *testing.T) {
	upg, _ := newParent(t, tableflip.Options{}, "succeed")
	ready(t, upg)
	if isClosed(upg.Exit()) {
		t.Fatal("Exit is closed before the upgrade")
	}
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	if !isClosed(upg.Exit()) {
		t.Error("Exit is open when Upgrade has returned")
	}
	wantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrUpgraded)
	upg.Stop()
	wantError(t, "Upgrade after Stop", upg.Upgrade(), tableflip.ErrUpgraded)
	if err := upg.Ready(); err != nil {
		t.Errorf("Ready: %v", err)
	}
}

// errors.Is and errors.As find the cause of every failed upgrade.
func TestFailedUpgradeTellsItsCause(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
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
		{"no binary", unstartable, is(os.ErrNotExist)},
		{"no binary at a path", unstartable, func(err error) bool {
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
		{"exit status", wrap("exit 3"), exits(3)},
		{"exit status 0", wrap("exit 0"), says("exit status 0")},
		{"panic", func(cmd *exec.Cmd) {
			cmd.Env = append(cmd.Env, roleVariable+"=panic")
			cmd.Stderr = nil
		}, exits(2)},
		{"signal", wrap("kill -9 $$"), func(err error) bool {
			var exit *exec.ExitError
			return errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		}},
		{"another word than ready", wrap("echo hello >&3"), says(`"hello\n"`)},
		{"words without end", wrap("exec cat /dev/zero >&3"), says(`"\x00\x00`)},
	} {
		t.Run(test.story, func(t *testing.T) {
			upg, _ := newParent(t, tableflip.Options{Command: test.command}, "fail")
			ready(t, upg)
			for range 2 {
				if err := upg.Upgrade(); !test.cause(err) {
					t.Errorf("got %v", err)
				} else if !strings.HasPrefix(err.Error(), "tableflip: ") {
					t.Errorf("%q does not say that it is ours", err)
				}
			}
			if isClosed(upg.Exit()) {
				t.Error("Exit is closed")
			}
		})
	}
}

func init() {
	roles["panic"] = func() { panic("as told") }
}

func TestUpgradeTimesOut(t *testing.T) {
	var child *exec.Cmd
	upg, _ := newParent(t, tableflip.Options{
		UpgradeTimeout: time.Millisecond,
		Command:        func(cmd *exec.Cmd) { child = cmd },
	}, "hang")
	ready(t, upg)
	err := upg.Upgrade()
	wantError(t, "Upgrade", err, os.ErrDeadlineExceeded)
	if err != nil && !strings.Contains(err.Error(), "1ms") {
		t.Errorf("%q does not say how long it has waited", err)
	}
	if !reaped(child.Process.Pid) {
		t.Error("the child was not reaped when Upgrade returned")
	}
}

func TestUpgradeTimeoutHasADefault(t *testing.T) {
	if tableflip.DefaultUpgradeTimeout != time.Minute {
		t.Errorf("DefaultUpgradeTimeout is %v", tableflip.DefaultUpgradeTimeout)
	}
	for _, timeout := range []time.Duration{0, -1} {
		upg, _ := newParent(t, tableflip.Options{UpgradeTimeout: timeout}, "succeed")
		ready(t, upg)
		if err := upg.Upgrade(); err != nil {
			t.Errorf("with UpgradeTimeout %d: %v", timeout, err)
		}
		upg.Stop()
	}
}

// The deadline of a context takes the place of the timeout, be it earlier or later.
func TestDeadlineReplacesUpgradeTimeout(t *testing.T) {
	t.Run("later", func(t *testing.T) {
		upg, _ := newParent(t, tableflip.Options{UpgradeTimeout: 1}, "succeed")
		ready(t, upg)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if err := upg.UpgradeContext(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Run("earlier", func(t *testing.T) {
		upg, _ := newParent(t, tableflip.Options{UpgradeTimeout: patience}, "hang")
		ready(t, upg)
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		wantError(t, "UpgradeContext", upg.UpgradeContext(ctx), context.DeadlineExceeded)
	})
}

func TestUpgradeIsCancelledWithItsCause(t *testing.T) {
	because := errors.New("because")
	upg, s := newParent(t, tableflip.Options{}, "hang")
	ready(t, upg)
	ctx, cancel := context.WithCancelCause(t.Context())
	result := inBackground(func() error { return upg.UpgradeContext(ctx) })
	hanging := s.await("hanging")
	cancel(because)
	wantError(t, "UpgradeContext", within(t, "Upgrade", result), because)
	if !reaped(hanging.pid) {
		t.Error("the child was not reaped when UpgradeContext returned")
	}
	if isClosed(upg.Exit()) {
		t.Error("Exit is closed")
	}
}

func TestUpgradeStartsNothingIfItsContextIsDone(t *testing.T) {
	upg, err := tableflip.New(tableflip.Options{Command: func(*exec.Cmd) { t.Error("Command was called") }})
	if err != nil {
		t.Fatal(err)
	}
	defer upg.Stop()
	ready(t, upg)
	because := errors.New("because")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(because)
	wantError(t, "UpgradeContext", upg.UpgradeContext(ctx), because)
}

// A cancellation that comes after the child's word, and before the commit, counts.
func TestUpgradeIsCancelledUpToTheCommit(t *testing.T) {
	var child *exec.Cmd
	upg, s := newParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) { child = cmd }}, "succeed")
	ready(t, upg)
	for range 5 {
		ctx, cancel := context.WithCancel(t.Context())
		restore := when(step.ReadyReceived, cancel)
		wantError(t, "UpgradeContext", upg.UpgradeContext(ctx), context.Canceled)
		restore()
		if !reaped(child.Process.Pid) {
			t.Error("the child was not reaped")
		}
	}
	if err := upg.Upgrade(); err != nil {
		t.Fatalf("the next upgrade: %v", err)
	}
	if m := s.await("ready"); m.pid != child.Process.Pid {
		t.Errorf("%d is ready, want %d", m.pid, child.Process.Pid)
	}
}

// The context of an upgrade that has succeeded has no meaning any more.
func TestCancellingAfterTheUpgradeDoesNothing(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "answer")
	ln, err := upg.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ready(t, upg)
	ctx, cancel := context.WithCancel(t.Context())
	if err := upg.UpgradeContext(ctx); err != nil {
		t.Fatal(err)
	}
	cancel()
	upg.Stop()
	child := s.await("ready")
	if got := answerOf(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.pid) {
		t.Errorf("the answer is %q, want %d", got, child.pid)
	}
}

// Elsewhere each failed upgrade loses two descriptors until the garbage collector
// finds them.
func TestFailedUpgradesLeakNothing(t *testing.T) {
	for way, command := range map[string]func(*exec.Cmd){
		"exits":            wrap("exit 7"),
		"gives up":         wrap("exec 3>&-; exit 7"),
		"cannot start":     unstartable,
		"hangs":            wrap("exec sleep 1000"),
		"closes its pipes": wrap("exec 3>&- 4>&-; exec sleep 1000"),
		"was refused":      func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{os.Stderr} },
		"output is copied": func(cmd *exec.Cmd) {
			wrap("exit 7")(cmd)
			cmd.Stderr = new(strings.Builder)
		},
	} {
		t.Run(way, func(t *testing.T) {
			upg, _ := newParent(t, tableflip.Options{Command: command, UpgradeTimeout: 10 * time.Millisecond}, "fail")
			server, _ := connect(t)
			if err := upg.AddConn("tcp", "", server); err != nil {
				t.Fatal(err)
			}
			if err := upg.AddFile("a", os.Stderr); err != nil {
				t.Fatal(err)
			}
			ready(t, upg)
			withoutGC(t)
			if err := upg.Upgrade(); err == nil {
				t.Fatal("no error")
			}
			descriptors, goroutines := openDescriptors(), runtime.NumGoroutine()
			for range 5 {
				if err := upg.Upgrade(); err == nil {
					t.Fatal("no error")
				}
			}
			if now := openDescriptors(); now > descriptors {
				t.Errorf("%d descriptors are open after 5 more upgrades, want %d", now, descriptors)
			}
			// Those that have nothing left to do may take their time to end.
			for late := time.Now().Add(patience); runtime.NumGoroutine() > goroutines; runtime.Gosched() {
				if time.Now().After(late) {
					t.Fatalf("%d goroutines after 5 more upgrades, want %d", runtime.NumGoroutine(), goroutines)
				}
			}
		})
	}
}

// The connections that a child has claimed are its own, and what it passes on are
// duplicates for the time of the upgrade.
func TestFailedUpgradesOfAChildLeakNothing(t *testing.T) {
	ln, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s, _ := startService(t, "fail-with-connection", withArg(ln.Addr().String()))
	if m := s.await("leaked"); m.text != "0" {
		t.Errorf("%s descriptors leaked", m.text)
	}
}

func init() {
	roles["fail-with-connection"] = func() {
		upg := must(tableflip.New(tableflip.Options{Command: func(cmd *exec.Cmd) {
			if arg() == "" {
				unstartable(cmd)
			}
			cmd.Env = append(cmd.Env, withArg(""))
		}}))
		if arg() != "" {
			must(0, upg.AddConn("tcp", "a", must(net.Dial("tcp", arg())).(*net.TCPConn)))
			mustBeReady(upg)
			must(0, upg.Upgrade())
			return
		}
		debug.SetGCPercent(-1)
		must(upg.Conn("tcp", "a"))
		mustBeReady(upg)
		must(0, upg.WaitForParent(context.Background()))
		upg.Upgrade()
		before := openDescriptors()
		for range 5 {
			if !errors.Is(upg.Upgrade(), os.ErrNotExist) {
				panic("no error")
			}
		}
		// There may be one less: that of the pipe that told of the parent's end.
		report("leaked", max(0, openDescriptors()-before))
	}
}

// connect returns both ends of a TCP connection.
func connect(t *testing.T) (server, client *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialed, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialed.Close() })
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { accepted.Close() })
	return accepted.(*net.TCPConn), dialed.(*net.TCPConn)
}

// A killed child is no zombie when Upgrade has returned.
func TestKilledChildIsReaped(t *testing.T) {
	var child *exec.Cmd
	upg, _ := newParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) { child = cmd }}, "hang")
	ready(t, upg)
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		restore := when(step.ChildStarted, cancel)
		wantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
		restore()
		if !reaped(child.Process.Pid) {
			t.Fatal("the child was not reaped when UpgradeContext returned")
		}
	}
}

// A descendant that holds a copied output open must not hold up the upgrade.
func TestKilledChildIsReapedThoughItsOutputIsOpen(t *testing.T) {
	var child *exec.Cmd
	upg, s := newParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
		wrap(`sleep 1000 & echo "report $! descendant \"\""; wait`)(cmd)
		cmd.Stderr = new(strings.Builder)
		child = cmd
	}}, "fail")
	ready(t, upg)
	ctx, cancel := context.WithCancel(t.Context())
	result := inBackground(func() error { return upg.UpgradeContext(ctx) })
	descendant := s.await("descendant")
	cancel()
	wantError(t, "Upgrade", within(t, "Upgrade", result), context.Canceled)
	if !reaped(child.Process.Pid) {
		t.Error("the child was not reaped when UpgradeContext returned")
	}
	if err := syscall.Kill(descendant.pid, 0); err != nil {
		t.Errorf("the descendant has ended: %v", err)
	}
}

// Orphans

// Elsewhere Ready fails with EPIPE, the documented pattern panics, and no process
// is left.
func TestOrphanCarriesTheServiceOn(t *testing.T) {
	for _, moment := range []string{"before New", "before Listen", "before Ready"} {
		t.Run(moment, func(t *testing.T) {
			dir := socketDir(t)
			pidFile, path := filepath.Join(dir, "pid"), filepath.Join(dir, "s")
			s, first := startService(t, "orphan", withArg(moment+"\n"+dir))
			tcp := s.await("parent").text
			child := s.await("Ready")
			if child.pid == first.Process.Pid || child.text != "<nil> true" {
				t.Errorf("Ready and HasParent: %v", child)
			}
			if m := s.await("WaitForParent"); m.text != "<nil>" {
				t.Errorf("WaitForParent: %s", m.text)
			}
			if m := s.await("Upgrade"); m.text != "true" {
				t.Error("Upgrade was not accepted")
			}
			if content, err := os.ReadFile(pidFile); string(content) != strconv.Itoa(child.pid) {
				t.Errorf("the PID file holds %q, %v, want %d", content, err, child.pid)
			}
			for network, addr := range map[string]string{"tcp": tcp, "unix": path} {
				if got := answerOf(t, network, addr); got != strconv.Itoa(child.pid) {
					t.Errorf("%s: the answer is %q, want %d", network, got, child.pid)
				}
			}
			terminate(t, child.pid)
			s.awaitEnd()
			if exists(path) || exists(pidFile) {
				t.Error("the process in charge did not clean up")
			}
		})
	}
}

func init() {
	roles["orphan"] = func() {
		terminated := terminated()
		moment, dir, _ := strings.Cut(arg(), "\n")
		isChild := len(handoverVariables()) > 0
		killParentAt := func(now string) {
			if !isChild || now != moment {
				return
			}
			parent := os.Getppid()
			syscall.Kill(parent, syscall.SIGKILL)
			// By the time that a process gets another parent, the descriptors of
			// the old one are closed.
			for os.Getppid() == parent {
				runtime.Gosched()
			}
		}

		killParentAt("before New")
		upg := must(tableflip.New(tableflip.Options{
			PIDFile: filepath.Join(dir, "pid"),
			Command: func(cmd *exec.Cmd) {
				if isChild {
					unstartable(cmd)
				}
			},
		}))
		killParentAt("before Listen")
		listeners := []net.Listener{
			must(upg.Listen("tcp", "localhost:0")),
			must(upg.Listen("unix", filepath.Join(dir, "s"))),
		}
		if !upg.HasParent() {
			mustBeReady(upg)
			report("parent", listeners[0].Addr())
			upg.Upgrade()
			panic("the parent lives on")
		}
		killParentAt("before Ready")
		report("Ready", upg.Ready(), upg.HasParent())
		report("WaitForParent", upg.WaitForParent(context.Background()))
		report("Upgrade", errors.Is(upg.Upgrade(), os.ErrNotExist))
		for _, ln := range listeners {
			go func() {
				conn := must(ln.Accept())
				must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
				conn.Close()
			}()
		}
		<-terminated
		upg.Stop()
	}
}

// Stop

func TestStopAbortsAnUpgrade(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "hang")
	ready(t, upg)
	result := inBackground(upg.Upgrade)
	hanging := s.await("hanging")
	upg.Stop()
	if !reaped(hanging.pid) {
		t.Error("the child was not reaped when Stop returned")
	}
	if !isClosed(upg.Exit()) {
		t.Error("Exit is open when Stop has returned")
	}
	wantError(t, "Upgrade", within(t, "Upgrade", result), tableflip.ErrStopped)
	wantError(t, "the next Upgrade", upg.Upgrade(), tableflip.ErrStopped)
}

// Stop that meets a commit: either the child is in charge of what they share, or
// nobody is and it is gone.
func TestStopAndCommitHaveOneWinner(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	for range 10 {
		upg, _ := newParent(t, tableflip.Options{}, "hold-socket", withArg(path))
		if _, err := upg.Listen("unix", path); err != nil {
			t.Fatal(err)
		}
		ready(t, upg)
		var stopping sync.WaitGroup
		restore := when(step.ReadyReceived, func() { stopping.Go(upg.Stop) })
		err := upg.Upgrade()
		restore()
		within(t, "Stop", waited(&stopping))
		switch {
		case err == nil && !exists(path):
			t.Error("the child is in charge, and Stop has unlinked its socket")
		case errors.Is(err, tableflip.ErrStopped) && exists(path):
			t.Error("Stop was first, and left the socket")
		case err != nil && !errors.Is(err, tableflip.ErrStopped):
			t.Errorf("Upgrade: %v", err)
		}
		os.Remove(path)
	}
}

func init() {
	roles["hold-socket"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		must(upg.Listen("unix", arg()))
		upg.Ready()
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
			upg, s := newParent(t, tableflip.Options{}, test.role)
			if test.before != "New" {
				ready(t, upg)
			}
			var result <-chan error
			switch test.before {
			case "upgrade under way":
				result = inBackground(upg.Upgrade)
				s.await("hanging")
			case "failed upgrade", "upgrade":
				if err := upg.Upgrade(); (err == nil) != (test.role == "succeed") {
					t.Fatal(err)
				}
			}
			var all sync.WaitGroup
			for range 8 {
				all.Go(func() {
					upg.Stop()
					if !isClosed(upg.Exit()) {
						t.Error("Exit is open when Stop has returned")
					}
				})
			}
			within(t, "Stop", waited(&all))
			if result != nil {
				wantError(t, "Upgrade", within(t, "Upgrade", result), tableflip.ErrStopped)
			}
			again, err := tableflip.New(tableflip.Options{})
			if err != nil {
				t.Fatal(err)
			}
			again.Stop()
		})
	}
}

// Whoever waits for Exit and then ends the process must leave no socket behind.
func TestStopUnlinksBeforeExitIsClosed(t *testing.T) {
	dir := socketDir(t)
	for range 20 {
		upg, err := tableflip.New(tableflip.Options{PIDFile: filepath.Join(dir, "pid")})
		if err != nil {
			t.Fatal(err)
		}
		var paths []string
		for i := range 10 {
			path := filepath.Join(dir, strconv.Itoa(i))
			ln, err := upg.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			// Another generation may need the file that this one has closed.
			ln.Close()
			if !exists(path) {
				t.Fatal("Close has unlinked the socket")
			}
			conn, err := upg.ListenPacket("unixgram", path+"gram")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			paths = append(paths, path, path+"gram")
		}
		ready(t, upg)
		left := inBackground(func() []string {
			<-upg.Exit()
			left, _ := filepath.Glob(filepath.Join(dir, "*"))
			return left
		})
		upg.Stop()
		if left := slices.DeleteFunc(paths, func(path string) bool { return !exists(path) }); len(left) > 0 {
			t.Errorf("left when Stop has returned: %v", left)
		}
		if left := within(t, "Exit", left); len(left) > 0 {
			t.Errorf("left when Exit was closed: %v", left)
		}
		if t.Failed() {
			return
		}
	}
}

func TestChildThatNeverGotInChargeStops(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "stop-at-once")
	ready(t, upg)
	var exit *exec.ExitError
	if err := upg.Upgrade(); !errors.As(err, &exit) || exit.ExitCode() != 9 {
		t.Errorf("Upgrade: %v, want exit status 9", err)
	}
	if m := s.await("stopped"); m.text != "true true" {
		t.Errorf("Exit closed and Ready refused: %s", m.text)
	}
}

func init() {
	roles["stop-at-once"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		upg.Stop()
		upg.Stop()
		report("stopped", isClosed(upg.Exit()), errors.Is(upg.Ready(), tableflip.ErrStopped))
		os.Exit(9)
	}
}

// A child that calls Stop and does not exit has given up all the same.
func TestChildThatStopsAndStaysIsKilled(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "stop-and-stay")
	ready(t, upg)
	err := upg.Upgrade()
	if err == nil || !strings.Contains(err.Error(), "gave up") {
		t.Errorf("Upgrade: %v", err)
	}
	if m := s.await("stopping"); !reaped(m.pid) {
		t.Error("the child was not reaped")
	}
}

func init() {
	roles["stop-and-stay"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		report("stopping")
		upg.Stop()
		untilKilled()
	}
}

// WaitForParent

func TestWaitForParentEndsWithItsContext(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "impatient")
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	for _, moment := range []string{"before-Ready", "after-Ready"} {
		if m := s.await(moment); m.text != "true" {
			t.Errorf("WaitForParent %s did not return its context's cause", moment)
		}
	}
}

func init() {
	roles["impatient"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		because := errors.New("because")
		wait := func() bool {
			// Many times, as it also waits for the verdict, and for either first.
			for range 20 {
				ctx, cancel := context.WithCancelCause(context.Background())
				result := inBackground(func() error { return upg.WaitForParent(ctx) })
				cancel(because)
				if !errors.Is(<-result, because) {
					return false
				}
			}
			return true
		}
		report("before-Ready", wait())
		mustBeReady(upg)
		report("after-Ready", wait())
	}
}

// Options.Command and what is started

func TestCommandChangesWhatIsStarted(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "other")
	if err := os.Symlink(must(os.Executable()), other); err != nil {
		t.Fatal(err)
	}
	output, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	calls := 0
	upg, s := newParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
		calls++
		if !os.SameFile(must(os.Stat(cmd.Path)), must(os.Stat(os.Args[0]))) {
			t.Errorf("Path is %q, want %q", cmd.Path, os.Args[0])
		}
		cmd.Path = other
		cmd.Args = []string{"argument zero", "argument one"}
		cmd.Env = append(cmd.Env, withArg("value"))
		cmd.Dir = dir
		cmd.Stderr = output
	}}, "describe")
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	if calls != 1 {
		t.Errorf("Command was called %d times", calls)
	}
	want := fmt.Sprintf(`["argument zero" "argument one"] %s value`, dir)
	if got := s.await("described").text; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	s.awaitEnd()
	if content, err := os.ReadFile(output.Name()); string(content) != "to standard error\n" {
		t.Errorf("the output is %q, %v", content, err)
	}
}

func init() {
	roles["describe"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		fmt.Fprintln(os.Stderr, "to standard error")
		mustBeReady(upg)
		report("described", fmt.Sprintf("%q", os.Args), must(os.Getwd()), arg())
	}
}

// Whatever Command does to what it gets, the next upgrade begins with this
// process's own arguments again.
func TestCommandCannotSpoilTheNextUpgrade(t *testing.T) {
	arguments := slices.Clone(os.Args)
	t.Cleanup(func() { copy(os.Args, arguments) })
	upg, err := tableflip.New(tableflip.Options{Command: func(cmd *exec.Cmd) {
		if !slices.Equal(cmd.Args, arguments) {
			t.Errorf("Args are %q, want %q", cmd.Args, arguments)
		}
		for i := range cmd.Args {
			cmd.Args[i] = "spoilt"
		}
		for i := range cmd.Env {
			cmd.Env[i] = "SPOILT=1"
		}
		unstartable(cmd)
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer upg.Stop()
	ready(t, upg)
	for range 2 {
		wantError(t, "Upgrade", upg.Upgrade(), os.ErrNotExist)
	}
	if !slices.Equal(os.Args, arguments) {
		t.Errorf("os.Args are %q", os.Args)
	}
}

// Options.Command may bring back variables that New has removed.
func TestCommandCannotForgeATable(t *testing.T) {
	upg, _ := newParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, "TABLEFLIP_HANDOVER=garbage", "TABLEFLIP_HANDOVER_0=garbage", "TABLEFLIP_HANDOVER_7=garbage")
	}}, "succeed")
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Error(err)
	}
}

func TestPanicInCommandLeavesTheUpgraderUsable(t *testing.T) {
	panicking := true
	upg, s := newParent(t, tableflip.Options{Command: func(*exec.Cmd) {
		if panicking {
			panic("as told")
		}
	}}, "succeed")
	ready(t, upg)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic was swallowed")
			}
		}()
		upg.Upgrade()
	}()
	panicking = false
	added := inBackground(func() error { return upg.AddFile("a", os.Stderr) })
	if err := within(t, "AddFile", added); err != nil {
		t.Error(err)
	}
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	s.await("ready")
}

// The process that is ready need not be the one that was started.
func TestWrapperStartsTheService(t *testing.T) {
	for story, script := range map[string]string{
		"waits for it":      `"$0" & wait`,
		"becomes it":        `exec "$0"`,
		"exits before it":   `"$0" &`,
		"is itself wrapped": `sh -c '"$0" & wait' "$0" & wait`,
	} {
		t.Run(story, func(t *testing.T) {
			var started *exec.Cmd
			upg, s := newParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
				wrap(script)(cmd)
				started = cmd
			}}, "answer")
			ln, err := upg.Listen("tcp", "localhost:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			ready(t, upg)
			if err := upg.Upgrade(); err != nil {
				t.Fatal(err)
			}
			child := s.await("ready")
			if (child.pid == started.Process.Pid) != (story == "becomes it") {
				t.Errorf("started %d, %d is ready", started.Process.Pid, child.pid)
			}
			if got := answerOf(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.pid) {
				t.Errorf("the answer is %q, want %d", got, child.pid)
			}
			s.awaitEnd()
		})
	}
}

func closedFile() *os.File {
	file := must(os.Open(os.DevNull))
	file.Close()
	return file
}

// Elsewhere a closed standard stream makes every upgrade fail.
func TestChildGetsTheNullDeviceForClosedStandardInput(t *testing.T) {
	stdin := os.Stdin
	defer func() { os.Stdin = stdin }()
	os.Stdin = closedFile()
	requireNullDevice(t, "stdin", nil)
}

func TestChildGetsTheNullDeviceForOtherClosedStreams(t *testing.T) {
	for story, command := range map[string]func(*exec.Cmd){
		"stdin closed":         func(cmd *exec.Cmd) { cmd.Stdin = closedFile() },
		"stdin is nil":         func(cmd *exec.Cmd) { cmd.Stdin = nil },
		"stdin is not a file":  func(cmd *exec.Cmd) { cmd.Stdin = (*os.File)(nil) },
		"stderr closed":        func(cmd *exec.Cmd) { cmd.Stderr = closedFile() },
		"stderr is not a file": func(cmd *exec.Cmd) { cmd.Stderr = (*os.File)(nil) },
	} {
		t.Run(story, func(t *testing.T) {
			stream, _, _ := strings.Cut(story, " ")
			requireNullDevice(t, stream, command)
		})
	}
}

func requireNullDevice(t *testing.T, stream string, command func(*exec.Cmd)) {
	t.Helper()
	upg, s := newParent(t, tableflip.Options{Command: command}, "standard-streams")
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	if m := s.await(stream); m.text != "true" {
		t.Errorf("%s is not %s in the child", stream, os.DevNull)
	}
}

func init() {
	roles["standard-streams"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		mustBeReady(upg)
		null := must(os.Stat(os.DevNull))
		report("stdin", os.SameFile(null, must(os.Stdin.Stat())))
		report("stderr", os.SameFile(null, must(os.Stderr.Stat())))
	}
}

// Elsewhere relative paths are looked up in the directory of the moment.
func TestRelativePathsSurviveChdir(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(must(os.Executable()), filepath.Join(dir, "service")); err != nil {
		t.Fatal(err)
	}
	s := newService(t)
	cmd := s.command("wanderer")
	cmd.Dir = dir
	cmd.Path, cmd.Args = "./service", []string{"./service"}
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	for generation := range 2 {
		m := s.await("ready")
		if want := fmt.Sprintf("%d %s [./service]", m.pid, dir); m.text != want {
			t.Errorf("generation %d: %s, want %s", generation+1, m.text, want)
		}
	}
}

func init() {
	roles["wanderer"] = func() {
		start := must(os.Getwd())
		elsewhere := must(os.MkdirTemp("", "flip"))
		defer os.RemoveAll(elsewhere)
		must(0, os.Chdir(elsewhere))
		upg := must(tableflip.New(tableflip.Options{PIDFile: "pid"}))
		mustBeReady(upg)
		pid := must(os.ReadFile(filepath.Join(start, "pid")))
		report("ready", string(pid), start, os.Args)
		if !upg.HasParent() {
			must(0, upg.Upgrade())
		}
	}
}

// The PID file

func TestPIDFileModeFollowsTheUmask(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o077} {
		path := filepath.Join(t.TempDir(), "pid")
		before := syscall.Umask(umask)
		upg, err := tableflip.New(tableflip.Options{PIDFile: path})
		if err == nil {
			err = upg.Ready()
		}
		syscall.Umask(before)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := info.Mode(), os.FileMode(0o644&^umask); got != want {
			t.Errorf("mode %v with umask %03o, want %v", got, umask, want)
		}
		upg.Stop()
	}
}

func TestPIDFileNamesTheProcessInCharge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	requireContent := func(when string, pid int) {
		t.Helper()
		if content, err := os.ReadFile(path); string(content) != strconv.Itoa(pid) {
			t.Errorf("%s: the PID file holds %q, %v, want %d", when, content, err, pid)
		}
	}
	var child *exec.Cmd
	upg, s := newParent(t, tableflip.Options{
		PIDFile: path,
		Command: func(cmd *exec.Cmd) { child = cmd },
	}, "with-pid-file", withArg(path))
	if exists(path) {
		t.Error("there is a PID file before Ready")
	}
	ready(t, upg)
	requireContent("after Ready", os.Getpid())

	ctx, cancel := context.WithCancel(t.Context())
	restore := when(step.ReadyReceived, func() {
		requireContent("before the commit", child.Process.Pid)
		cancel()
	})
	wantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	restore()
	requireContent("after a failed upgrade", os.Getpid())
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*")); len(left) != 1 {
		t.Errorf("beside the PID file: %v", left)
	}

	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	inCharge := s.await("ready").pid
	requireContent("after the upgrade", inCharge)
	upg.Stop()
	requireContent("after the parent's Stop", inCharge)
	terminate(t, inCharge)
	s.awaitEnd()
	if exists(path) {
		t.Error("the PID file is there after the child's Stop")
	}
}

func init() {
	roles["with-pid-file"] = func() {
		terminated := terminated()
		upg := must(tableflip.New(tableflip.Options{PIDFile: arg()}))
		mustBeReady(upg)
		report("ready")
		<-terminated
		upg.Stop()
	}
}

func TestStopLeavesAForeignPIDFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	upg, err := tableflip.New(tableflip.Options{PIDFile: path})
	if err != nil {
		t.Fatal(err)
	}
	ready(t, upg)
	if err := os.WriteFile(path, []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	upg.Stop()
	if content, err := os.ReadFile(path); string(content) != "1" {
		t.Errorf("the PID file holds %q, %v", content, err)
	}
}

func TestReadyCanBeTriedAgainIfThePIDFileWasTheProblem(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	upg, err := tableflip.New(tableflip.Options{PIDFile: filepath.Join(dir, "pid"), Command: unstartable})
	if err != nil {
		t.Fatal(err)
	}
	defer upg.Stop()
	wantError(t, "Ready", upg.Ready(), os.ErrNotExist)
	wantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrNotReady)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	ready(t, upg)
	wantError(t, "Upgrade", upg.Upgrade(), os.ErrNotExist)
}

// The parent has not heard that its child is ready if that failed.
func TestChildTriesReadyAgainIfThePIDFileWasTheProblem(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	upg, s := newParent(t, tableflip.Options{}, "ready-later", withArg(dir))
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	if m := s.await("ready"); m.text != "true <nil>" {
		t.Errorf("Ready without a directory, and with one: %s", m.text)
	}
}

func init() {
	roles["ready-later"] = func() {
		upg := must(tableflip.New(tableflip.Options{PIDFile: filepath.Join(arg(), "pid")}))
		first := upg.Ready()
		must(0, os.Mkdir(arg(), 0o700))
		report("ready", errors.Is(first, os.ErrNotExist), upg.Ready())
	}
}

// Without a PID file before the upgrade there is none after it failed.
func TestFailedUpgradeRemovesANewPIDFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	upg, _ := newParent(t, tableflip.Options{PIDFile: path}, "with-pid-file", withArg(path))
	ready(t, upg)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	during(t, step.ReadyReceived, func() {
		if !exists(path) {
			t.Error("the child has written no PID file")
		}
		cancel()
	})
	wantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	if exists(path) {
		t.Error("the dead child's PID file is there")
	}
}

// Options.Logger

func TestLoggerHearsOfAChildThatDiesEarly(t *testing.T) {
	logger, lines := newLogger()
	upg, s := newParent(t, tableflip.Options{Logger: logger}, "ready-then-fail")
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	child := s.await("ready")
	terminate(t, child.pid)
	line := within(t, "a message", lines)
	for _, want := range []string{"tableflip: ", "level=WARN", "started=" + strconv.Itoa(child.pid), "ready=" + strconv.Itoa(child.pid), "exit status 5"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q lacks %q", line, want)
		}
	}
}

func init() {
	roles["ready-then-fail"] = func() {
		terminated := terminated()
		upg := must(tableflip.New(tableflip.Options{}))
		mustBeReady(upg)
		report("ready")
		<-terminated
		os.Exit(5)
	}
}

func TestLoggerHearsOfAPIDFileThatCannotBeRestored(t *testing.T) {
	logger, lines := newLogger()
	path := filepath.Join(t.TempDir(), "pid")
	upg, _ := newParent(t, tableflip.Options{Logger: logger, PIDFile: path}, "hang")
	ready(t, upg)
	ctx, cancel := context.WithCancel(t.Context())
	during(t, step.ChildStarted, func() {
		// A directory is not replaced by a file.
		if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
			t.Error(err)
		}
		cancel()
	})
	wantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	if line := within(t, "a message", lines); !strings.Contains(line, "level=ERROR") || !strings.Contains(line, "PID file") {
		t.Errorf("got %q", line)
	}
}

// Everything at once

func TestReadyAndStopAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	for range 100 {
		upg, err := tableflip.New(tableflip.Options{PIDFile: path})
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for range 2 {
			all.Go(func() {
				if err := upg.Ready(); err != nil && !errors.Is(err, tableflip.ErrStopped) {
					t.Errorf("Ready: %v", err)
				}
			})
			all.Go(upg.Stop)
		}
		within(t, "Ready and Stop", waited(&all))
		if exists(path) {
			t.Fatal("the PID file is there after Stop")
		}
	}
}

// Whatever is called at the same time, each result is one that the documentation
// names, nothing blocks for ever, and no descriptor is lost.
func TestManyGoroutinesUntilStop(t *testing.T) {
	upg, _ := newParent(t, tableflip.Options{Command: wrap("exit 7")}, "fail")
	ready(t, upg)
	// A test's first network call opens descriptors that stay.
	connect(t)
	withoutGC(t)
	if err := upg.Upgrade(); err == nil {
		t.Fatal("no error")
	}
	descriptors := openDescriptors()

	// expect reports whether it is time to end.
	expect := func(err error, allowed ...error) bool {
		if err == nil || slices.ContainsFunc(allowed, func(want error) bool { return errors.Is(err, want) }) {
			return false
		}
		if !errors.Is(err, tableflip.ErrStopped) {
			t.Errorf("unexpected: %v", err)
		}
		return true
	}
	var all sync.WaitGroup
	repeat := func(call func(i int) (end bool)) {
		for range 2 {
			all.Go(func() {
				for i := 0; !call(i); i++ {
				}
			})
		}
	}
	var upgrades atomic.Int32
	enough := make(chan struct{})
	repeat(func(int) bool {
		err := upg.Upgrade()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			if upgrades.Add(1) == 5 {
				close(enough)
			}
			return false
		}
		if err == nil {
			t.Error("an upgrade succeeded")
		}
		return expect(err, tableflip.ErrUpgradeInProgress)
	})
	repeat(func(int) bool {
		ln, err := upg.Listen("tcp", "localhost:0")
		if err != nil {
			return expect(err)
		}
		defer ln.Close()
		return expect(upg.RemoveListener("tcp", "localhost:0"))
	})
	repeat(func(int) bool {
		conn, err := upg.ListenPacket("udp", "localhost:0")
		if err != nil {
			return expect(err)
		}
		defer conn.Close()
		return expect(upg.RemovePacketConn("udp", "localhost:0"))
	})
	repeat(func(i int) bool {
		fileName := strconv.Itoa(i % 3)
		return expect(upg.AddFile(fileName, os.Stderr)) || expect(upg.RemoveFile(fileName), os.ErrNotExist)
	})
	repeat(func(int) bool {
		_, filesErr := upg.Files()
		_, connErr := upg.Conn("tcp", "x")
		return expect(filesErr) || expect(connErr)
	})
	repeat(func(int) bool {
		if err := upg.WaitForParent(context.Background()); err != nil || upg.HasParent() {
			t.Error(err, upg.HasParent())
		}
		return expect(upg.Ready()) || isClosed(upg.Exit())
	})
	within(t, "5 upgrades", enough)
	for range 4 {
		all.Go(upg.Stop)
	}
	within(t, "all goroutines", waited(&all))
	if now := openDescriptors(); now > descriptors {
		t.Errorf("%d descriptors are open, and %d were before", now, descriptors)
	}
}

// What the registry has accepted while an upgrade came along is the child's, and
// what it has let go is not.
func TestNothingIsLostWhenAnUpgradeComesAlong(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "list-files")
	ready(t, upg)
	var mu sync.Mutex
	passedOn := map[string]bool{}
	note := func(fileName string, held bool, err error) (ended bool) {
		if err == nil {
			mu.Lock()
			passedOn[fileName] = held
			mu.Unlock()
		} else if !errors.Is(err, tableflip.ErrUpgraded) {
			t.Error(err)
		}
		return err != nil
	}
	var all sync.WaitGroup
	for worker := range 4 {
		all.Go(func() {
			for i := 0; ; i++ {
				fileName := fmt.Sprint(worker, ".", i%5)
				if note(fileName, true, upg.AddFile(fileName, os.Stderr)) {
					return
				}
				if i%2 == 0 && note(fileName, false, upg.RemoveFile(fileName)) {
					return
				}
			}
		})
	}
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	within(t, "all goroutines", waited(&all))
	var want []string
	for fileName, held := range passedOn {
		if held {
			want = append(want, "fd:"+fileName+":")
		}
	}
	slices.Sort(want)
	if got := s.await("files").text; got != fmt.Sprintf("%q", want) {
		t.Errorf("the child got %s, want %q", got, want)
	}
}

func init() {
	roles["list-files"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		var names []string
		for _, file := range must(upg.Files()) {
			names = append(names, file.Name())
		}
		mustBeReady(upg)
		slices.Sort(names)
		report("files", fmt.Sprintf("%q", names))
	}
}
