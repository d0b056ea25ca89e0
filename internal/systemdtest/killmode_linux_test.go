package systemdtest

import (
	"os"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
)

// This file owns what each KillMode= costs if something dies while two processes of the
// service run. Its log is the table of examples/deploy/README.md:
//
//	go test -v -run TestKillMode .

func TestKillMode(t *testing.T) {
	leaveToLong(t)
	for _, mode := range []killMode{
		{name: "control-group", answersAtStop: true},
		{name: "mixed"},
		{name: "process", answersAtStop: true, leaves: true},
	} {
		t.Run(mode.name, func(t *testing.T) {
			onMachine(t, func(t *testing.T) {
				s := newService(t, notify)
				killMode := "KillMode=" + mode.name
				s.change(killMode)
				all := tolerance{warnings: "."}
				s.phase("Start", tolerance{}, s.start)
				s.phase("Crash", all, s.crash)
				s.phase("StopWhileDraining", all, func() { s.stopWhileDraining(mode) })
				s.change(killMode, "TimeoutStopSec=5s", "StartLimitInterval=10min", "ExecStart=", "ExecStart="+installed+" -patient")
				s.phase("StartPatient", all, s.start)
				s.phase("CrashWhilePatient", all, func() { s.crashWhilePatient(mode) })
				s.phase("OldDiesInUpgrade", all, func() { s.oldDiesInUpgrade(mode) })
			})
		})
	}
}

// A killMode is a KillMode=, and what it must do.
type killMode struct {
	name          string
	answersAtStop bool // what an older process has begun
	leaves        bool // older processes behind
}

// crash has the new process die while the old one has requests: one that is finished a
// third of a second later, and one that is not.
func (s *service) crash() {
	s.t.Helper()
	old := s.main
	soon, never := s.begin(), s.begin()
	s.reloadDraining()
	s.awaitStart(func() time.Time {
		began := s.killMain()
		time.AfterFunc(time.Second/3, func() {
			s.t.Logf("a request that ends after 1/3 s is answered: %v", soon.complete() == soon.want)
		})
		return began
	})
	s.awaitEnd(old) // the drain would last for 30 s
	if never.complete() == never.want {
		s.t.Error("an ended process has answered")
	}
}

func (s *service) killMain() time.Time {
	began := time.Now()
	proctest.Kill(s.t, s.main, syscall.SIGKILL)
	return began
}

// awaitStart has kill begin an outage, and waits for its end, by systemd.
func (s *service) awaitStart(kill func() time.Time) {
	s.t.Helper()
	before, _ := strconv.Atoi(s.show()["NRestarts"])
	began := kill()
	s.askMain()
	s.t.Logf("first good answer after %v", time.Since(began).Round(10*time.Millisecond))
	s.await("NRestarts", func(now string) bool {
		restarts, _ := strconv.Atoi(now)
		return restarts > before
	})
	s.await("MainPID", equal(strconv.Itoa(s.main)))
}

// crashWhilePatient has the new process die while the old one does not hurry.
func (s *service) crashWhilePatient(mode killMode) {
	s.t.Helper()
	old := s.main
	request := s.begin()
	s.reloadDraining()
	s.awaitStart(s.killMain)
	if isRunning(old) != mode.leaves {
		s.t.Errorf("the old process is left behind: %v, want %v", !mode.leaves, mode.leaves)
	}
	if mode.leaves {
		s.t.Logf("left behind: %s", residentMemory(old))
	}
	if answered := request.complete() == request.want; answered != mode.leaves {
		s.t.Errorf("the old process has answered: %v", answered)
	}
}

func residentMemory(pid int) string {
	content, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	return string(regexp.MustCompile(`VmRSS:.*`).Find(content))
}

func (s *service) stopWhileDraining(mode killMode) {
	s.t.Helper()
	old, request := s.main, s.begin()
	s.reloadDraining()
	successor := s.main
	s.systemctl("stop", "--no-block", s.service)
	proctest.AwaitThat(s.t, "the new process has ended", func() bool { return !isRunning(successor) })
	if !mode.answersAtStop {
		s.awaitEnd(old)
	}
	if got := request.complete(); (got == request.want) != mode.answersAtStop {
		s.t.Errorf("the old process's request: %s", got)
	}
	s.await("ActiveState", equal("inactive"))
	s.awaitEnd(old)
}

// oldDiesInUpgrade has the old process die before the new one can do anything, so that
// this one takes charge when systemd has already started another.
func (s *service) oldDiesInUpgrade(mode killMode) {
	s.t.Helper()
	s.systemctl("stop", s.service)
	s.systemctl("set-environment", `WRAPPER=until [ -e /run/go ]; do sleep 0.1; done; exec "$@"`)
	s.systemctl("reset-failed", s.service) // forgets its starts so far
	s.start()
	s.version = s.install("good")
	s.systemctl("reload", "--no-block", s.service)
	proctest.AwaitThat(s.t, "the wrapper runs", func() bool { return len(commands("sh")) > 0 })
	began := s.killMain()
	if mode.leaves {
		s.await("ActiveState", equal("failed")) // the address is in use
	} else {
		s.askMain()
	}
	proctest.OK(s.t, os.WriteFile("/run/go", nil, 0o644))
	s.askMain()
	s.t.Logf("an answer after %v, from the main process: %v", time.Since(began).Round(10*time.Millisecond), s.show()["MainPID"] == strconv.Itoa(s.main))
	if !mode.leaves {
		s.await("MainPID", equal(strconv.Itoa(s.main)))
		return
	}
	// The orphan serves, and systemd neither stops nor restarts it.
	s.systemctl("stop", s.service)
	if !isRunning(s.main) {
		s.t.Error("the orphan has ended")
	}
	proctest.Kill(s.t, s.main, syscall.SIGKILL)
	s.systemctl("reset-failed", s.service)
}
