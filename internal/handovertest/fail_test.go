//go:build unix

package handovertest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// A new version that says why it cannot take charge.

// failingWith is what the role "failing" fails with.
func failingWith(name string) error {
	switch name {
	case "nil":
		return nil
	case "newlines":
		return errors.New("\n\nno disk\r\nabort\n\x00acknowledged\n\x1b[2J")
	case "long":
		return errors.New("no disk: " + strings.Repeat("é", 5000))
	case "invalid":
		return errors.New("no disk \xff\xfe")
	case "empty":
		return errors.New("")
	}
	return errors.New("no disk")
}

func init() {
	// failing fails when it is told to, by its argument: WHEN REASON SOCKET.
	proctest.Role("failing", func() {
		fields := strings.Fields(proctest.Arg())
		when, reason, path := fields[0], failingWith(fields[1]), fields[2]
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Must(upg.Listen("unix", path))
		proctest.Must(upg.Listen("unix", path+".new"))
		switch when {
		case "before", "and-stays", "and-returns":
			upg.Fail(reason)
		case "twice":
			upg.Fail(reason)
			upg.Fail(errors.New("another reason"))
			upg.Stop()
		case "after":
			failed := make(chan struct{})
			proctest.When(step.ReadySaid, func() {
				go func() {
					upg.Fail(reason)
					close(failed)
				}()
			})
			if err := upg.Ready(); !errors.Is(err, tableflip.ErrStopped) {
				panic(err)
			}
			<-failed
		}
		proctest.Report("failed", proctest.IsClosed(upg.Exit()), proctest.Exists(path), proctest.Exists(path+".new"))
		switch when {
		case "and-stays":
			proctest.UntilKilled()
		case "and-returns":
			return
		}
		os.Exit(4)
	})
}

func TestFail(t *testing.T) {
	for _, test := range []struct{ when, reason, says string }{
		{"before", "plain", "failed: no disk (exit status 4)"},
		{"after", "plain", "failed: no disk (exit status 4)"},
		{"twice", "plain", "failed: no disk (exit status 4)"},
		{"and-stays", "plain", "failed: no disk"},
		{"and-returns", "plain", "failed: no disk"},
		{"before", "nil", "failed: it gave no reason (exit status 4)"},
		{"before", "newlines", "failed: no disk abort acknowledged [2J (exit status 4)"},
		{"before", "empty", "failed:  (exit status 4)"},
		{"before", "invalid", "failed: no disk \uFFFD (exit status 4)"},
		{"after", "long", "failed: no disk: " + strings.Repeat("é", 495) + "… (exit status 4)"},
	} {
		t.Run(test.when+" "+test.reason, func(t *testing.T) {
			if test.when == "and-stays" {
				shorten(t, &step.ExitGrace)
			}
			path := filepath.Join(proctest.SocketDir(t), "s")
			logger, lines := proctest.NewLogger()
			upg, s := NewParent(t, tableflip.Options{Logger: logger}, "failing", proctest.WithArg(test.when+" "+test.reason+" "+path))
			proctest.OK(t, proctest.ErrorOf(upg.Listen("unix", path)))
			proctest.OK(t, upg.Ready())
			if test.when == "after" {
				proctest.During(t, step.ReadyReceived, func() { s.Await("failed") })
			}
			err := upg.Upgrade()
			if err == nil || !strings.HasSuffix(err.Error(), test.says) || !utf8.ValidString(err.Error()) {
				t.Errorf("Upgrade: %v, want %s", err, test.says)
			}
			var exit *exec.ExitError
			if errors.As(err, &exit) != strings.HasSuffix(test.says, "(exit status 4)") {
				t.Errorf("Upgrade: %v has an exit status: %t", err, exit != nil)
			}
			if line := lines.Await(t, "tableflip: failed"); !strings.Contains(line, "failed: ") || !strings.Contains(line, "cause=reason") {
				t.Errorf("logged %s", line)
			}
			if test.when != "after" {
				if m := s.Await("failed"); m.Text != "true true false" {
					t.Errorf("in the child, Exit is closed, the shared file is there, and its own: %s", m.Text)
				}
			}
			if proctest.IsClosed(upg.Exit()) || !proctest.Exists(path) || proctest.Exists(path+".new") {
				t.Error("the parent is not as it was")
			}
		})
	}
}

// In charge, Fail is Stop.
func TestFailInCharge(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	for _, ready := range []bool{false, true} {
		logger, lines := proctest.NewLogger()
		upg := NewUpgrader(t, tableflip.Options{Logger: logger})
		proctest.OK(t, proctest.ErrorOf(upg.Listen("unix", path)))
		if ready {
			proctest.OK(t, upg.Ready())
		}
		upg.Fail(errors.New("no disk"))
		if !proctest.IsClosed(upg.Exit()) || upg.Replaced() || proctest.Exists(path) {
			t.Error("the process has not stopped")
		}
		if line := lines.Await(t, "level=ERROR"); !strings.Contains(line, `error="no disk"`) {
			t.Errorf("logged %s", line)
		}
		upg.Fail(nil)
	}
}

// A child that is in charge has nobody to tell.
func TestFailAfterCommit(t *testing.T) {
	before := awaitedSuccessors()
	upg, s := NewParent(t, tableflip.Options{}, "fail-in-charge")
	Upgrade(t, upg)
	if m := s.Await("failed"); m.Text != "true" {
		t.Error("Exit is not closed")
	}
	proctest.AwaitThat(t, "the end of the successor is noticed", func() bool { return awaitedSuccessors() <= before })
	if proctest.IsClosed(upg.Hurry()) {
		t.Error("Hurry is closed: the successor has not said that it stops")
	}
}

func init() {
	proctest.Role("fail-in-charge", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		upg.Fail(errors.New("no disk"))
		proctest.Report("failed", proctest.IsClosed(upg.Exit()))
		os.Exit(4)
	})
}
