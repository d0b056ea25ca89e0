//go:build unix

package proctest_test

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

func TestMain(m *testing.M) { proctest.Main(m) }

var (
	woken  = step.New("woken")
	asleep = step.New("asleep")
)

func init() {
	proctest.Role("echo", func() {
		proctest.Report("said", proctest.Arg())
		proctest.Report("after", proctest.Arg())
		<-proctest.Terminated()
	})
	proctest.Role("puppet", func() {
		w := proctest.OpenWire()
		step.Reached(woken)
		for o := range w.Orders() {
			w.Report("doing", o.Do, o.Arguments)
			w.ReportError("done", syscall.ENOENT)
			step.Reached(asleep)
		}
	})
}

func TestReports(t *testing.T) {
	s, cmd := proctest.Start(t, "echo", proctest.WithArg("two\nlines"))
	for _, event := range []string{"said", "after"} {
		if m := s.Await(event); m.PID != cmd.Process.Pid || m.Text != "two\nlines" {
			t.Errorf("%s: got %v", event, m)
		}
	}
	proctest.Terminate(t, cmd.Process.Pid)
	s.AwaitEnd()
}

func TestWire(t *testing.T) {
	s := proctest.NewService(t)
	cmd := s.Command("puppet", s.Wire(), s.PauseAt(woken), s.DieAt(asleep))
	reaped := s.Start(cmd)
	p := s.Next()
	p.AwaitStep(woken)
	p.Order("walk", "a", "b")
	p.Resume()
	if m := p.Take("done"); m.PID != p.PID || m.Text != syscall.ENOENT.Error() || m.Cause != m.Text {
		t.Errorf("got %v", m)
	}
	if m := p.Take("doing"); m.Text != "walk [a b]" {
		t.Errorf("got %v", m)
	}
	p.AwaitEnd()
	<-reaped
	if !strings.Contains(cmd.ProcessState.String(), "killed") {
		t.Errorf("it has ended with %v", cmd.ProcessState)
	}
}

func TestRoleTwice(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a second role of one name does not panic")
		}
	}()
	proctest.Role("echo", func() {})
}

func TestStepTwice(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a second step of one name does not panic")
		}
	}()
	step.New(step.AfterCommit.String())
}

// Each test of the package "misuse" does something that must make it fail.
func TestMisuse(t *testing.T) {
	run := func(arguments ...string) string {
		output, err := exec.Command("go", append([]string{"test", "./testdata/misuse"}, arguments...)...).CombinedOutput()
		if err == nil {
			t.Errorf("go test %q passes", arguments)
		}
		return string(output)
	}
	for _, test := range []struct{ name, want string }{
		{"TestDuring", `this process has not come to the step "before commit"`},
		{"TestDieAt", `no process has died at the step "before commit"`},
		{"TestPauseAt", `no process has paused at the step "before commit"`},
		{"TestNoRole", `no role "misspelt"`},
	} {
		if output := run("-run", "^"+test.name+"$"); !strings.Contains(output, test.want) {
			t.Errorf("%s does not say %q:\n%s", test.name, test.want, output)
		}
	}
	const unused = `no test uses the roles ["unused"]`
	if output := run("-args", "pass"); !strings.Contains(output, unused) {
		t.Errorf("no word of an unused role:\n%s", output)
	}
	output, err := exec.Command("go", "test", "./testdata/misuse", "-run", "Test", "-args", "pass").CombinedOutput()
	if err != nil {
		t.Errorf("with a filter, roles may be unused: %v\n%s", err, output)
	}
}
