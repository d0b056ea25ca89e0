//go:build unix

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
)

// Servers that misbehave. The name says what they do.
func init() {
	proctest.Role("ends at once", func() {
		slogToStderr()
		slog.Error("exiting", "error", "address already in use")
	})
	proctest.Role("never ready", func() {
		slogToStderr()
		slog.Info("listening", "addr", "127.0.0.1:1")
		await(syscall.SIGTERM)
	})
	proctest.Role("another's PID file", func() {
		becomeReady(os.Getpid() + 1)
		await(syscall.SIGTERM)
	})
	proctest.Role("hangs", func() {
		becomeReady(os.Getpid())
		await(syscall.SIGTERM)
	})
	proctest.Role("fails", func() {
		becomeReady(os.Getpid())
		await(syscall.SIGHUP)
		slog.Error("upgrade failed", "error", `the "child" said no`)
		await(syscall.SIGTERM)
	})
	proctest.Role("dies", func() {
		becomeReady(os.Getpid())
		await(syscall.SIGHUP)
		fmt.Fprintln(os.Stderr, "panic: help")
		os.Exit(2)
	})
	proctest.Role("never exits", func() {
		becomeReady(os.Getpid())
		await(syscall.SIGHUP)
		becomeReady(startSuccessor("successor").Process.Pid)
		slog.Info("upgrade succeeded", "took", time.Second)
		await(syscall.SIGTERM)
	})
	proctest.Role("moves", func() {
		becomeReady(os.Getpid())
		await(syscall.SIGHUP)
		slog.Info("listening", "addr", "127.0.0.1:2")
		slog.Info("upgrade succeeded", "took", time.Second)
		await(syscall.SIGTERM)
	})
	proctest.Role("does nothing", func() {
		becomeReady(os.Getpid())
		await(syscall.SIGHUP)
		becomeReady(os.Getpid())
		slog.Info("upgrade succeeded", "took", time.Second)
		await(syscall.SIGTERM)
	})
	proctest.Role("deaf", func() {
		startSuccessor("deaf successor")
		becomeReady(os.Getpid())
		stayDeaf()
	})
	proctest.Role("successor", func() { await(syscall.SIGTERM) })
	proctest.Role("deaf successor", stayDeaf)
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
	cmd.Env = append(os.Environ(), proctest.Environment(role))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		panic(err)
	}
	return cmd
}

// setRole gives a role to the processes that the test starts.
func setRole(t *testing.T, role string) {
	t.Helper()
	name, value, _ := strings.Cut(proctest.Environment(role), "=")
	t.Setenv(name, value)
}

// startRole starts a server that has a role. Tests choose the bounds that they
// want to be exceeded, and get generous ones for the rest. The end of the test
// stops what is left of the server.
func startRole(t *testing.T, role string, few bounds) (*server, error) {
	t.Helper()
	setRole(t, role)
	generous := bounds{
		start: cmp.Or(few.start, proctest.Patience),
		drain: cmp.Or(few.drain, proctest.Patience),
		stop:  cmp.Or(few.stop, proctest.Patience),
	}
	srv, err := startServer(t.Context(), t.TempDir(), os.Args[0], "v1", generous)
	if err == nil {
		t.Cleanup(func() {
			if !srv.log.hasEnded() {
				killGroup(srv.first.Process.Pid)
				srv.log.endsIn(proctest.Patience)
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
			proctest.OK(t, err)
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
	proctest.OK(t, err)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("Ctrl-C")
	cancel(cause)
	if _, err := srv.upgrade(ctx, "v2"); !errors.Is(err, cause) {
		t.Error(err)
	}
	if err := srv.run(ctx, proctest.Patience); !errors.Is(err, cause) {
		t.Error(err)
	}
	if err := srv.stop(); err != nil {
		t.Error(err)
	}
	if err := srv.run(t.Context(), proctest.Patience); !errors.Is(err, errGone) {
		t.Error("after its end:", err)
	}
	if err := srv.stop(); err != nil {
		t.Error("second stop:", err)
	}
}

func TestStopKillsWhatDoesNotStop(t *testing.T) {
	srv, err := startRole(t, "deaf", bounds{stop: 500 * time.Millisecond})
	proctest.OK(t, err)
	checkError(t, srv.stop(), "was killed")
	if !srv.log.hasEnded() {
		t.Error("there are processes left")
	}
}

func TestRunning(t *testing.T) {
	if !running(os.Getpid()) {
		t.Error("this process is not running")
	}
	setRole(t, "successor")
	cmd := exec.Command(os.Args[0])
	stdout, err := cmd.StdoutPipe()
	proctest.OK(t, err)
	proctest.OK(t, cmd.Start())
	pid := cmd.Process.Pid
	if !running(pid) {
		t.Error("the child is not running")
	}
	cmd.Process.Kill()
	stdout.Read(make([]byte, 1)) // until the end of the file, when it dies
	if _, err := os.Stat("/proc/self/stat"); err == nil {
		proctest.AwaitThat(t, "a zombie is not running", func() bool { return !running(pid) })
	}
	cmd.Wait()
	if running(pid) {
		t.Error("the child is still running")
	}
}
