//go:build unix

package main

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Servers that misbehave. The name says what they do.
func init() {
	roles["ends at once"] = func() {
		slogToStderr()
		slog.Error("exiting", "error", "address already in use")
	}
	roles["never ready"] = func() {
		slogToStderr()
		slog.Info("listening", "addr", "127.0.0.1:1")
		await(syscall.SIGTERM)
	}
	roles["another's PID file"] = func() {
		becomeReady(os.Getpid() + 1)
		await(syscall.SIGTERM)
	}
	roles["hangs"] = func() {
		becomeReady(os.Getpid())
		await(syscall.SIGTERM)
	}
	roles["fails"] = func() {
		becomeReady(os.Getpid())
		await(syscall.SIGHUP)
		slog.Error("upgrade failed", "error", `the "child" said no`)
		await(syscall.SIGTERM)
	}
	roles["dies"] = func() {
		becomeReady(os.Getpid())
		await(syscall.SIGHUP)
		panic("help")
	}
	roles["never exits"] = func() {
		becomeReady(os.Getpid())
		await(syscall.SIGHUP)
		becomeReady(startSuccessor("successor").Process.Pid)
		slog.Info("upgrade succeeded", "took", time.Second)
		await(syscall.SIGTERM)
	}
	roles["moves"] = func() {
		becomeReady(os.Getpid())
		await(syscall.SIGHUP)
		slog.Info("listening", "addr", "127.0.0.1:2")
		slog.Info("upgrade succeeded", "took", time.Second)
		await(syscall.SIGTERM)
	}
	roles["does nothing"] = func() {
		becomeReady(os.Getpid())
		await(syscall.SIGHUP)
		becomeReady(os.Getpid())
		slog.Info("upgrade succeeded", "took", time.Second)
		await(syscall.SIGTERM)
	}
	roles["deaf"] = func() {
		startSuccessor("deaf successor")
		becomeReady(os.Getpid())
		stayDeaf()
	}
	roles["successor"] = func() { await(syscall.SIGTERM) }
	roles["deaf successor"] = stayDeaf
}

// Signals wait here until a role asks for them.
var hangups, terminations = make(chan os.Signal, 1), make(chan os.Signal, 1)

func await(sig os.Signal) {
	signal.Notify(hangups, syscall.SIGHUP)
	signal.Notify(terminations, syscall.SIGTERM)
	if sig == syscall.SIGHUP {
		<-hangups
	} else {
		<-terminations
	}
}

func stayDeaf() {
	for {
		await(syscall.SIGTERM)
	}
}

// becomeReady says that the server is ready, and that it is pid.
func becomeReady(pid int) {
	slogToStderr()
	signal.Notify(hangups, syscall.SIGHUP)
	signal.Notify(terminations, syscall.SIGTERM)
	slog.Info("listening", "addr", "127.0.0.1:1")
	pidFile := os.Args[4] // after -listen ADDRESS -pid-file
	if err := os.WriteFile(pidFile, []byte(strconv.Itoa(pid)), 0o644); err != nil {
		panic(err)
	}
	slog.Info("ready")
}

func slogToStderr() {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
}

// startSuccessor starts a process that its caller's parent does not know.
func startSuccessor(role string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		panic(err)
	}
	return cmd
}

// startRole starts a server that has a role. Tests choose the bounds that they
// want to be exceeded, and get generous ones for the rest. The end of the test
// stops what is left of the server.
func startRole(t *testing.T, role string, few bounds) (*server, error) {
	t.Helper()
	t.Setenv(roleVariable, role)
	generous := bounds{
		start: cmp.Or(few.start, patience),
		drain: cmp.Or(few.drain, patience),
		stop:  cmp.Or(few.stop, patience),
	}
	srv, err := startServer(t.Context(), t.TempDir(), os.Args[0], "v1", generous)
	if err == nil {
		t.Cleanup(func() {
			if !srv.log.hasEnded() {
				killGroup(srv.first.Process.Pid)
				srv.log.endsIn(patience)
			}
		})
	}
	return srv, err
}

func checkError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("the error does not say %q:\n%v", part, err)
		}
	}
}

func TestServerThatDoesNotStart(t *testing.T) {
	for role, want := range map[string]string{
		"ends at once":       "address already in use",
		"never ready":        "not ready in 500ms",
		"another's PID file": "its PID file says",
	} {
		t.Run(role, func(t *testing.T) {
			few := bounds{}
			if role == "never ready" {
				few.start = 500 * time.Millisecond
			}
			srv, err := startRole(t, role, few)
			if srv != nil {
				t.Error("there is a server")
			}
			checkError(t, err, want)
		})
	}
}

func TestUpgradeThatFails(t *testing.T) {
	const short = 200 * time.Millisecond
	for role, test := range map[string]struct {
		few  func(*bounds)
		want string
	}{
		"hangs":        {func(b *bounds) { b.start = short }, "has not said in 200ms how it went"},
		"fails":        {nil, `the "child" said no`},
		"dies":         {nil, "panic: help"},
		"never exits":  {func(b *bounds) { b.drain = short }, "has not exited in 200ms"},
		"moves":        {nil, "listens on 127.0.0.1:2 instead of 127.0.0.1:1"},
		"does nothing": {nil, "the PID file still says"},
	} {
		t.Run(role, func(t *testing.T) {
			srv, err := startRole(t, role, bounds{})
			if err != nil {
				t.Fatal(err)
			}
			if test.few != nil {
				test.few(&srv.bounds)
			}
			_, err = srv.upgrade(t.Context(), "v2")
			checkError(t, err, test.want, "last that it has logged")
			if len(srv.generations) != 2 {
				t.Errorf("%d generations", len(srv.generations))
			}
			if err := srv.stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestUpgradeInterrupted(t *testing.T) {
	srv, err := startRole(t, "hangs", bounds{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("Ctrl-C")
	cancel(cause)
	if _, err := srv.upgrade(ctx, "v2"); !errors.Is(err, cause) {
		t.Error(err)
	}
	if err := srv.run(ctx, patience); !errors.Is(err, cause) {
		t.Error(err)
	}
	if err := srv.stop(); err != nil {
		t.Error(err)
	}
	if err := srv.run(t.Context(), patience); !errors.Is(err, errGone) {
		t.Error("after its end:", err)
	}
	if err := srv.stop(); err != nil {
		t.Error("second stop:", err)
	}
}

func TestStopKillsWhatDoesNotStop(t *testing.T) {
	srv, err := startRole(t, "deaf", bounds{stop: 500 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	checkError(t, srv.stop(), "was killed")
	if !srv.log.hasEnded() {
		t.Error("there are processes left")
	}
}

func TestRunning(t *testing.T) {
	if !running(os.Getpid()) {
		t.Error("this process is not running")
	}
	t.Setenv(roleVariable, "successor")
	cmd := exec.Command(os.Args[0])
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	if !running(pid) {
		t.Error("the child is not running")
	}
	cmd.Process.Kill()
	stdout.Read(make([]byte, 1)) // the end of the file, as it dies
	if _, err := os.Stat("/proc/self/stat"); err == nil {
		eventually(t, "a zombie is not running", func() bool { return !running(pid) })
	}
	cmd.Wait()
	if running(pid) {
		t.Error("the child is still running")
	}
}
