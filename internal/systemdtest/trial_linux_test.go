package systemdtest

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
)

// This file owns trials (Options.Trial), in which old and new serve side by side.

// endless is a trial that no test waits for.
const endless = time.Hour

// forTrials has the service that is started next have trials that last for this time.
func (s *service) forTrials(last time.Duration, changes ...string) {
	s.t.Helper()
	s.trial = last
	s.systemctl("set-environment", "TRIAL="+last.String())
	if len(changes) > 0 {
		s.change(changes...)
	}
}

// undoings are what undoes a trial.
var undoings = []struct {
	name      string
	behaviour string
	do        func(t *testing.T, child int) // with a version that behaves well
	says      string
	cut       bool // what the new process has begun
}{
	{name: "Quit", behaviour: "quit", says: "exited during its trial"},
	{name: "Exit", behaviour: "exit", says: "exited during its trial", cut: true},
	{name: "Sick", behaviour: "sick", says: "not healthy: this version is sick"},
	{name: "Kill", behaviour: "good", says: "exited during its trial", cut: true,
		do: func(t *testing.T, child int) { proctest.Kill(t, child, syscall.SIGKILL) }},
	{name: "Stop", behaviour: "good", says: "was stopped during its trial",
		do: func(t *testing.T, child int) { proctest.Kill(t, child, syscall.SIGTERM) }},
}

func TestTrial(t *testing.T) {
	for _, k := range []kind{notify, pidFile, activated, stored, supervised} {
		name, _, _ := strings.Cut(k.service, ".")
		t.Run(name, func(t *testing.T) {
			if k != notify {
				leaveToLong(t)
			}
			onMachine(t, k.runTrials)
		})
	}
}

func (k kind) runTrials(t *testing.T) {
	s := newService(t, k)
	s.forTrials(endless)
	s.phase("Start", tolerance{}, s.start)
	s.load = startLoad(t)
	for _, u := range undoings {
		s.phase(u.name, tolerance{cut: u.cut}, func() { s.undoTrial(u.behaviour, u.do, u.says, !u.cut) })
	}
	s.phase("CrashFiveTimes", tolerance{}, func() {
		for range 5 {
			s.undoTrial("quit", nil, "exited during its trial", false)
		}
	})
	s.load.end()
	s.load = nil
	s.phase("StopOnTrial", tolerance{}, s.stopOnTrial)

	s.forTrials(time.Second)
	s.phase("StartAgain", tolerance{}, s.start)
	s.load = startLoad(t)
	s.phase("Pass", tolerance{}, func() {
		for range 3 {
			s.passTrial()
		}
	})
	s.load.end()
	s.load = nil
}

// A process that does not react when its trial is over is killed.
func TestTrialHangs(t *testing.T) {
	leaveToLong(t)
	eachKind(t, []kind{notify, supervised}, func(s *service) {
		s.forTrials(15 * time.Second) // more than it takes to suspend the process
		s.phase("Start", tolerance{}, s.start)
		s.load = startLoad(s.t)
		s.phase("Suspend", tolerance{cut: true}, func() {
			suspend := func(t *testing.T, child int) { proctest.Kill(t, child, syscall.SIGSTOP) }
			s.undoTrial("good", suspend, "did not take charge in 10s", false)
		})
		s.phase("Pass", tolerance{}, s.passTrial)
		s.load.end()
		s.load = nil
	})
}

// A reload whose trial lasts longer than a start may take does not time out.
func TestTrialOutlastsTimeout(t *testing.T) {
	leaveToLong(t)
	for _, test := range []struct {
		name string
		kind
		since   int // version of systemd
		changes []string
	}{
		{"Notify", notify, 0, []string{"TimeoutStartSec=12s"}},
		{"NotifyReload", notify, 253, []string{"TimeoutStartSec=12s", "Type=notify-reload", "ExecReload="}},
		{"Supervised", supervised, 0, []string{"TimeoutStartSec=12s"}},
		{"Control", controlled, 0, []string{"TimeoutStartSec=12s"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			onMachine(t, func(t *testing.T) {
				if v := systemdVersion(t); v < test.since {
					t.Skipf("systemd %d has no Type=notify-reload", v)
				}
				s := newService(t, test.kind)
				s.forTrials(15*time.Second, test.changes...)
				s.phase("Start", tolerance{}, s.start)
				s.load = startLoad(t)
				s.phase("Pass", tolerance{}, s.passTrial)
				s.phase("Sick", tolerance{warnings: "Control process exited|^Reload failed"}, func() { s.undoTrial("sick", nil, "not healthy: this version is sick", true) })
				s.load.end()
				s.load = nil
			})
		})
	}
}

// The control socket tells how a trial went, and only the process in charge answers there.
func TestTrialControl(t *testing.T) {
	onMachine(t, func(t *testing.T) {
		s := newService(t, controlled)
		s.forTrials(endless)
		s.phase("Start", tolerance{}, s.start)
		s.load = startLoad(t)
		s.phase("Sick", tolerance{warnings: reloadFailed}, func() {
			s.tried[s.install("sick")] = true
			s.wantReloadFails("not healthy: this version is sick")
			s.expectRunning()
		})
		s.phase("Cancel", tolerance{warnings: reloadFailed}, func() {
			s.undoTrial("good", s.cancelByControl, "upgrade cancelled", true)
		})
		s.load.end()
		s.load = nil
		s.phase("StopOnTrial", tolerance{warnings: "Control process exited|Failed with result"}, s.stopOnTrial)

		s.forTrials(time.Second)
		s.phase("StartAgain", tolerance{}, s.start)
		s.load = startLoad(t)
		s.phase("Pass", tolerance{}, s.reloadByControl)
		s.load.end()
		s.load = nil
	})
}

// cancelByControl has the client of the reload leave, once the process in charge has told
// of the trial.
func (s *service) cancelByControl(t *testing.T, child int) {
	t.Helper()
	// The first line is about the process that answers.
	first := fmt.Sprintf("process %d, .* is in charge", s.main)
	want := regexp.MustCompile("^" + first + `(?s:.*\n)` + fmt.Sprintf("process %d, .* is on trial", child))
	for range 10 {
		if status := s.ask("status"); !want.MatchString(status) {
			t.Fatalf("no %q in the status:\n%s", want, status)
		}
	}
	s.systemctl("kill", "--kill-whom=control", "--signal=KILL", s.service)
}

// If the old process dies, systemd ends the new one as well.
func TestTrialEndsWithParent(t *testing.T) {
	onMachine(t, func(t *testing.T) {
		s := newService(t, notify)
		s.forTrials(endless)
		s.phase("Start", tolerance{}, s.start)
		s.load = startLoad(t)
		s.phase("Kill", tolerance{refused: true, cut: true, warnings: exited + "|Reload failed|reception only permitted for main PID"}, func() {
			child := s.beginTrial("good")
			s.restarted(s.version, func() { proctest.Kill(s.t, s.main, syscall.SIGKILL) })
			s.awaitEnd(child)
			if s.main == child {
				s.t.Errorf("the process that was on trial, %d, is the main process", child)
			}
		})
		s.load.end()
		s.load = nil
	})
}

// Under a supervisor that waits for it, the new one is in charge.
func TestTrialOutlivesParent(t *testing.T) {
	onMachine(t, func(t *testing.T) {
		s := newService(t, supervised)
		s.forTrials(endless)
		s.phase("Start", tolerance{}, s.start)
		s.load = startLoad(t)
		s.phase("Kill", tolerance{cut: true}, func() {
			before := s.look()
			child := s.beginTrial("good")
			proctest.Kill(s.t, s.main, syscall.SIGKILL)
			s.awaitEnd(s.main)
			s.setMain(strconv.Itoa(child))
			s.load.settle(s.t)
			s.wantAlone(before)
		})
		s.load.end()
		s.load = nil
		s.phase("Stop", tolerance{}, func() {
			s.systemctl("stop", s.service)
			s.expect(map[string]string{"Result": "success", "ActiveState": "inactive"})
		})
	})
}

// beginTrial upgrades, and returns the new process once it answers.
func (s *service) beginTrial(behaviour string) (child int) {
	s.t.Helper()
	before := s.look()
	s.version = s.install(behaviour)
	s.tried[s.version] = true
	s.systemctl("reload", "--no-block", s.service)
	proctest.AwaitThat(s.t, s.version+" answers", func() bool {
		child = s.load.answering(s.version)
		return child != 0
	})
	if s.service != controlled.service { // whose client waits for the end of the trial
		s.await("ControlPID", equal("0")) // a stop would kill what still runs of the reload, and fail
	}
	if s.trial != endless || behaviour != "good" { // it may have ended
		return child
	}
	if got := s.look(); got != before {
		s.t.Errorf("on trial: got %+v, want %+v", got, before)
	}
	if s.notifies {
		s.await("StatusText", equal(fmt.Sprintf("upgrade: process %d is on trial for %s", child, s.trial)))
	}
	return child
}

// A look is what must not change because of a trial.
type look struct {
	mainPID, restarts string
	pidFile           string
	socket            uint64 // inode of the Unix socket's file
}

func (s *service) look() look {
	s.t.Helper()
	properties := s.show()
	l := look{mainPID: properties["MainPID"], restarts: properties["NRestarts"]}
	if s.service == pidFile.service {
		content, err := os.ReadFile("/run/web.pid")
		proctest.OK(s.t, err)
		l.pidFile = string(content)
	}
	var stat syscall.Stat_t
	proctest.OK(s.t, syscall.Stat(unixPath, &stat))
	l.socket = stat.Ino
	return l
}

// wantAlone checks that the process in charge is alone, and that nothing else has changed.
func (s *service) wantAlone(before look) {
	s.t.Helper()
	proctest.AwaitThat(s.t, fmt.Sprintf("just %d runs", s.main), func() bool {
		return slices.Equal(processes(), []int{s.main})
	})
	if got := s.look(); got != before {
		s.t.Errorf("got %+v, want %+v", got, before)
	}
	s.await("ActiveState", equal("active"))
}

// passTrial upgrades to a version that passes its trial.
func (s *service) passTrial() {
	s.t.Helper()
	s.commitTrial(s.beginTrial("good"))
}

func (s *service) commitTrial(child int) {
	s.t.Helper()
	old, before := s.main, s.look()
	s.awaitEnd(old)
	s.setMain(strconv.Itoa(child))
	if !s.supervised {
		before.mainPID = strconv.Itoa(child)
		s.await("MainPID", equal(before.mainPID))
	}
	if before.pidFile != "" {
		before.pidFile = strconv.Itoa(child)
	}
	s.awaitAnswers()
	s.wantAlone(before)
	s.expect(map[string]string{"StatusText": ""})
}

// undoTrial upgrades to a version whose trial is undone, and returns when the old process is
// alone, and has said why. A new version that behaves well and is not killed drains.
func (s *service) undoTrial(behaviour string, do func(*testing.T, int), says string, drains bool) {
	s.t.Helper()
	before, version, cursor := s.look(), s.version, journalCursor(s.t)
	var begun *unfinished
	if behaviour == "quit" { // before it answers
		s.install(behaviour)
		s.systemctl("reload", "--no-block", s.service)
	} else if child := s.beginTrial(behaviour); do != nil {
		if drains {
			begun = s.beginWith(child, s.version, s.main)
		}
		do(s.t, child)
	}
	s.version = version
	failure := regexp.MustCompile("upgrade failed.*" + says)
	proctest.AwaitThat(s.t, "the service logs the failure", func() bool {
		for _, e := range journal(s.t, cursor) {
			if e.PID == strconv.Itoa(s.main) && failure.MatchString(e.Message) {
				return true
			}
		}
		return false
	})
	if s.notifies {
		s.await("StatusText", failure.MatchString)
	}
	if begun != nil {
		begun.finish(s.t)
	}
	s.load.settle(s.t)
	s.wantAlone(before)
}

// stopOnTrial stops the service while old and new serve, and each has begun a request.
func (s *service) stopOnTrial() {
	s.t.Helper()
	old, version := s.main, s.version
	s.load = startLoad(s.t) // by which the new process is known
	child := s.beginTrial("good")
	s.load.end()
	s.load = nil // nobody is to answer its clients
	requests := []*unfinished{s.beginWith(old, version, child), s.beginWith(child, s.version, old)}
	s.systemctl("stop", "--no-block", s.service)
	s.await("ActiveState", equal("deactivating"))
	for _, request := range requests {
		request.finish(s.t)
	}
	if s.service == controlled.service { // the client of the reload was interrupted
		s.await("ActiveState", equal("failed"))
		s.expect(map[string]string{"Result": "exit-code"})
	} else {
		s.await("ActiveState", equal("inactive"))
		s.expect(map[string]string{"Result": "success"})
	}
	s.expect(map[string]string{"ExecMainStatus": "0", "NRestarts": "0"})
	s.awaitNobody()
	if _, err := os.Lstat(unixPath); (err == nil) != (s.socket != "") {
		s.t.Errorf("the file of the Unix socket: %v", err)
	}
}

// beginWith begins a request with one of two processes that serve.
func (s *service) beginWith(pid int, version string, other int) *unfinished {
	s.t.Helper()
	proctest.Suspend(s.t, other)
	defer proctest.Continue(s.t, other)
	u := s.begin()
	u.want = fmt.Sprintf("%s %d hello", version, pid)
	return u
}
