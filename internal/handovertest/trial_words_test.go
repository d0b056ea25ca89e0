//go:build unix

package handovertest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

func init() {
	// logging fails on trial, and says what it had logged by then, and before.
	proctest.Role("logging", func() {
		terminated := proctest.Terminated()
		logger, log := proctest.NewLogger()
		upg := proctest.Must(tableflip.New(tableflip.Options{Logger: logger}))
		MustBeReady(upg)
		proctest.Report("serving", logged(log))
		<-terminated
		upg.Fail(errors.New("no disk"))
		proctest.Report("failed", logged(log))
	})
}

// logged returns the messages that have been logged, without waiting.
func logged(log proctest.Logbook) string {
	var messages []string
	for range len(log) {
		_, rest, _ := strings.Cut(<-log, `msg="tableflip: `)
		message, _, _ := strings.Cut(rest, `"`)
		messages = append(messages, message)
	}
	return strings.Join(messages, ", ")
}

// What either process logs is not held back until the trial ends, because both may crash
// before.
func TestTrialLog(t *testing.T) {
	logger, log := proctest.NewLogger()
	upg, s := NewParent(t, tableflip.Options{Trial: time.Hour, Logger: logger}, "logging")
	proctest.OK(t, upg.Ready())
	result := proctest.InBackground(upg.Upgrade)
	child := s.Await("serving")
	log.Await(t, "tableflip: on trial")
	if child.Text != "on trial" {
		t.Errorf("when Ready had returned, the log had %q", child.Text)
	}
	proctest.Terminate(t, child.PID)
	if got := s.Await("failed").Text; got != "this process stops because it has failed, draining" {
		t.Errorf("when Fail had returned, the log had %q", got)
	}
	if err := proctest.Within(t, "Upgrade", result); err == nil || !strings.Contains(err.Error(), "no disk") {
		t.Errorf("Upgrade returned %v", err)
	}
}

// The end of a child that has failed on trial is told, although Upgrade has waited for it.
func TestTrialFailedEnds(t *testing.T) {
	logger, log := proctest.NewLogger()
	script := "{ echo here $$ trial; echo ready; read -r trial; echo failed no disk; } >&3 <&4"
	upg := NewUpgrader(t, tableflip.Options{Trial: time.Hour, Logger: logger, Command: proctest.Shell(script)})
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil || !strings.Contains(err.Error(), "no disk") {
		t.Errorf("Upgrade returned %v", err)
	}
	log.Await(t, `msg="tableflip: ended"`)
}

// However often an upgrade has waited for its end, a process whose trial was undone is told
// once to hurry: it may read nothing, and there is not room for ever.
func TestTrialHurryOnce(t *testing.T) {
	heard := filepath.Join(t.TempDir(), "heard")
	script := `{ echo here - trial; echo ready; read -r trial; echo; echo stopping; ` +
		`while read -r line; do echo "$line" >>"` + heard + `"; test "$line" != stopping || exit; done; } >&3 <&4`
	upg := NewUpgrader(t, tableflip.Options{Trial: time.Hour, MaxDraining: 1, Command: proctest.Shell(script)})
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil || !strings.Contains(err.Error(), "stopped during its trial") {
		t.Fatalf("Upgrade returned %v", err)
	}
	for range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		restore := proctest.During(t, step.UndoneAwaited, cancel)
		proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
		restore()
	}
	upg.Stop()
	var content []byte
	proctest.AwaitThat(t, "it has heard that the service stops", func() bool {
		content, _ = os.ReadFile(heard)
		return strings.HasSuffix(string(content), "stopping\n")
	})
	if string(content) != "abort\nhurry\nstopping\n" {
		t.Errorf("it has heard %q", content)
	}
}

// A trial that is cancelled before it begins is none.
func TestTrialCancelledEarly(t *testing.T) {
	heard := filepath.Join(t.TempDir(), "heard")
	upg := NewUpgrader(t, tableflip.Options{
		Trial:   time.Hour,
		Command: proctest.Shell(`{ echo here - trial; echo ready; cat >"` + heard + `"; } >&3 <&4`),
	})
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancel(t.Context())
	proctest.During(t, step.ReadyReceived, cancel)
	proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	if content, _ := os.ReadFile(heard); strings.Contains(string(content), "trial") {
		t.Errorf("the child has heard %q", content)
	}
}

// A child that knows no trials has none, if there is no Logger to hear of that either.
func TestTrialUnknown(t *testing.T) {
	script := `{ echo here -; echo ready; read -r verdict; test "$verdict" = commit && echo acknowledged; cat >/dev/null; } >&3 <&4`
	upg := NewUpgrader(t, tableflip.Options{Trial: time.Hour, Command: proctest.Shell(script)})
	Upgrade(t, upg)
}

// How long an upgrade waits for the end of a process whose trial was undone.
func TestTrialUndoneTimeout(t *testing.T) {
	script := `{ echo here - trial; echo ready; read -r trial; echo stopping; until test "$word" = stopping; do read -r word; done; } >&3 <&4`
	logger, log := proctest.NewLogger()
	upg := NewUpgrader(t, tableflip.Options{UpgradeTimeout: time.Millisecond, Trial: time.Hour, Logger: logger, Command: proctest.Shell(script)})
	proctest.OK(t, upg.Ready())
	patient, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	if err := upg.UpgradeContext(patient); err == nil || !strings.Contains(err.Error(), "stopped during its trial") {
		t.Fatalf("Upgrade returned %v", err)
	}

	if line := log.Await(t, `msg="tableflip: failed"`); !strings.Contains(line, "process.pid=") {
		t.Errorf("the log says %s, and not of which process", line)
	}
	err := proctest.Within(t, "Upgrade", proctest.InBackground(upg.Upgrade))
	proctest.WantError(t, "Upgrade", err, os.ErrDeadlineExceeded)
	proctest.WantError(t, "Upgrade", err, tableflip.ErrUpgradeInProgress)
	if line := log.Await(t, `msg="tableflip: failed"`); strings.Contains(line, "process.pid=") {
		t.Errorf("of an upgrade that has started none, the log says %s", line)
	}
	proctest.During(t, step.UndoneAwaited, func() { time.AfterFunc(20*time.Millisecond, cancel) }) // when the timeout is over
	err = upg.UpgradeContext(patient)
	proctest.WantError(t, "UpgradeContext", err, context.Canceled)
	if errors.Is(err, tableflip.ErrUpgradeInProgress) {
		t.Errorf("UpgradeContext, which was cancelled, returned %v", err)
	}
}

// A process that leaves its trial may have replaced the PID file.
func TestTrialPIDFileRestored(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	script := `{ echo here - trial; echo ready; read -r trial; echo 1 >"` + pidFile + `"; echo stopping; ` +
		`until test "$word" = stopping; do read -r word; done; } >&3 <&4`
	upg := NewUpgrader(t, tableflip.Options{Trial: time.Hour, PIDFile: pidFile, Command: proctest.Shell(script)})
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil || !strings.Contains(err.Error(), "stopped during its trial") {
		t.Fatalf("Upgrade returned %v", err)
	}
	if content, err := os.ReadFile(pidFile); string(content) != strconv.Itoa(os.Getpid()) {
		t.Errorf("the PID file holds %q, %v", content, err)
	}
}

// A stopper is the handler of a Logger that stops an Upgrader when a trial begins.
type stopper struct {
	slog.Handler
	upg *atomic.Pointer[tableflip.Upgrader]
}

func (s stopper) Enabled(context.Context, slog.Level) bool { return true }

func (s stopper) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "tableflip: on trial" {
		s.upg.Load().Stop()
	}
	return nil
}

// A handler may end the trial that it is told of.
func TestTrialLoggerStops(t *testing.T) {
	var upg atomic.Pointer[tableflip.Upgrader]
	script := "{ echo here - trial; echo ready; read -r trial; echo stopping; } >&3 <&4"
	parent := NewUpgrader(t, tableflip.Options{
		Trial:   time.Hour,
		Logger:  slog.New(stopper{slog.DiscardHandler, &upg}),
		Command: proctest.Shell(script),
	})
	upg.Store(parent)
	proctest.OK(t, parent.Ready())
	err := proctest.Within(t, "Upgrade", proctest.InBackground(parent.Upgrade))
	if !errors.Is(err, tableflip.ErrStopped) && !strings.Contains(fmt.Sprint(err), "stopped during its trial") {
		t.Errorf("Upgrade returned %v", err)
	}
	proctest.Within(t, "Stop", parent.Exit())
}

// A child may say that it drains before it is told to, while nobody listens.
func TestTrialStoppedUnheard(t *testing.T) {
	hearNothingLater(t)
	said, heard := filepath.Join(t.TempDir(), "said"), filepath.Join(t.TempDir(), "heard")
	script := `{ echo here - trial; echo ready; read -r trial; echo stopping; : >"` + said + `"; ` +
		`while read -r line; do echo "$line" >>"` + heard + `"; test "$line" != stopping || exit; done; } >&3 <&4`
	upg := NewUpgrader(t, tableflip.Options{Trial: time.Hour, Command: proctest.Shell(script)})
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancel(t.Context())
	proctest.During(t, step.TrialBegun, func() {
		proctest.AwaitThat(t, "it has said that it drains", func() bool { return proctest.Exists(said) })
		cancel()
		time.Sleep(20 * time.Millisecond) // most likely the upgrade knows by then; if not, it hears the child in time
	})
	if upg.UpgradeContext(ctx) == nil {
		t.Fatal("the upgrade was neither cancelled nor refused")
	}
	upg.Stop()
	proctest.AwaitThat(t, "it has heard that the service stops", func() bool {
		content, _ := os.ReadFile(heard)
		return string(content) == "abort\nstopping\n"
	})
}

// A process that has drained on trial, and has closed its pipes, may have something left to do.
func TestTrialEndsByItself(t *testing.T) {
	done := filepath.Join(t.TempDir(), "done")
	script := `{ echo here - trial; echo ready; read -r trial; echo stopping; } >&3 <&4; exec 3>&- 4<&-; sleep 0.3; : >"` + done + `"`
	upg := NewUpgrader(t, tableflip.Options{Trial: time.Hour, Command: proctest.Shell(script)})
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil || !strings.Contains(err.Error(), "stopped during its trial") {
		t.Fatalf("Upgrade returned %v", err)
	}
	proctest.AwaitThat(t, "it has ended by itself", func() bool { return proctest.Exists(done) })
}

// One that never ends is killed.
func TestTrialNeverEnds(t *testing.T) {
	shorten(t, &step.ExitGrace)
	var child *exec.Cmd
	upg := NewUpgrader(t, tableflip.Options{Trial: time.Hour, Command: func(cmd *exec.Cmd) {
		proctest.Shell("{ echo here - trial; echo ready; read -r trial; echo stopping; } >&3 <&4; exec 3>&- 4<&-; exec sleep 1000")(cmd)
		child = cmd
	}})
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil || !strings.Contains(err.Error(), "stopped during its trial") {
		t.Errorf("Upgrade returned %v", err)
	}
	proctest.AwaitDeath(t, child.Process.Pid)
}
