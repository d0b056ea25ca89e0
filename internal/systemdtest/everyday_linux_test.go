package systemdtest

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
)

// This file owns what happens to services every day: they are stopped and restarted
// while they drain, crash while they drain, and talk to systemd themselves.

// eachKind runs test for each of these, each on a machine of its own.
func eachKind(t *testing.T, kinds []kind, test func(*service)) {
	onMachine(t, func(t *testing.T) {
		for _, k := range kinds {
			s := newService(t, k)
			name, _, _ := strings.Cut(k.service, ".")
			t.Run(name, func(t *testing.T) {
				s.t = t
				test(s)
			})
			s.t = t
			s.systemctl(append([]string{"stop"}, k.units()...)...)
		}
	})
}

// longerThanHurry is longer than a process drains once its successor has crashed.
const longerThanHurry = 1500 * time.Millisecond

// expectStays fails the test if a process ends within this time.
func (s *service) expectStays(pid int, while time.Duration) {
	s.t.Helper()
	for end := time.Now().Add(while); time.Now().Before(end); time.Sleep(10 * time.Millisecond) { // a poll
		if !isRunning(pid) {
			s.t.Errorf("process %d has ended", pid)
			return
		}
	}
}

// isRunning reports whether a process lives, and is no zombie.
func isRunning(pid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && !proctest.IsZombie(pid)
}

// leaveToLong skips a test in the short form of .ci/run, whose minutes it would take.
func leaveToLong(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("takes minutes: left to .ci/run long")
	}
}

// Requests of both processes are answered, even one that needs longer than a process
// drains once its successor has crashed.
func TestStopWhileDraining(t *testing.T) {
	leaveToLong(t)
	eachKind(t, []kind{notify, pidFile, supervised}, func(s *service) {
		s.phase("Start", tolerance{}, s.start)
		s.phase("Restart", tolerance{}, func() { s.endWhileDraining("restart") })
		s.phase("Stop", tolerance{}, func() { s.endWhileDraining("stop") })
		s.change("ExecStop=/bin/kill -TERM $MAINPID")
		s.phase("StartAgain", tolerance{}, s.start)
		s.phase("ExecStop", tolerance{}, func() { s.endWhileDraining("stop") })
	})
}

func (s *service) endWhileDraining(verb string) {
	s.t.Helper()
	old, first := s.main, s.begin()
	s.reloadDraining()
	successor, second := s.main, s.begin()
	if old == successor {
		s.t.Fatal("there was no upgrade")
	}

	s.version = s.install("good")
	s.systemctl(verb, "--no-block", s.service)
	s.await("ActiveState", equal("deactivating"))
	s.expectStays(successor, longerThanHurry/3)
	second.finish(s.t)
	proctest.AwaitThat(s.t, "the new process has ended", func() bool { return !isRunning(successor) })
	s.expectStays(old, longerThanHurry)
	first.finish(s.t)

	if verb == "restart" {
		s.askMain()
		s.await("ActiveState", equal("active"))
		return
	}
	s.await("ActiveState", equal("inactive"))
	s.expect(map[string]string{"Result": "success"})
	s.awaitNobody()
}

// The old process must not make the outage as long as its drain, which is 30 seconds.
func TestCrashWhileDraining(t *testing.T) {
	leaveToLong(t)
	eachKind(t, []kind{notify, pidFile, activated, stored}, func(s *service) {
		s.phase("Start", tolerance{}, s.start)
		s.phase("Crash", tolerance{warnings: exited + "|does not exist or is a zombie"}, s.crashWhileDraining)
	})
}

// Programs look for their manager once, at their start.
func TestWatchdog(t *testing.T) {
	leaveToLong(t)
	eachKind(t, []kind{notify, supervised}, func(s *service) {
		s.change("WatchdogSec=5min")
		s.phase("Start", tolerance{}, s.start)
		for range 3 {
			// The old process, which drains, pings on, and is not the main one any more.
			s.phase("Reload", tolerance{warnings: "reception only permitted for main PID"}, func() {
				old := s.main
				s.reloadDraining()
				s.awaitEnd(old)
				for range 2 { // the end of the upgrade may have changed it once
					before := s.show()["WatchdogTimestampMonotonic"]
					s.await("WatchdogTimestampMonotonic", func(now string) bool { return now != before })
				}
			})
		}
	})
}

func TestClearedEnvironment(t *testing.T) {
	leaveToLong(t)
	eachKind(t, []kind{notify, supervised}, func(s *service) {
		command := installed
		if s.supervised {
			command = filepath.Join(filepath.Dir(installed), "tableflip-supervise") + " -- " + installed
		}
		s.change("ExecStart=", "ExecStart="+command+" -forget")
		s.phase("Start", tolerance{}, s.start)
		s.load = startLoad(s.t)
		for range 2 {
			s.phase("Reload", tolerance{}, func() {
				old := s.main
				s.reloadDraining()
				s.awaitEnd(old)
				s.awaitAnswers()
			})
		}
		s.load.end()
		s.load = nil
	})
}

// A child says that it is the main process, and never becomes ready.
func TestMainPIDToldEarly(t *testing.T) {
	leaveToLong(t)
	onMachine(t, func(t *testing.T) {
		s := newService(t, notify)
		s.phase("Start", tolerance{}, s.start)
		s.load = startLoad(t)
		s.phase("Main", tolerance{warnings: "reception only permitted for main PID"}, func() {
			restarts := s.show()["NRestarts"]
			s.failReload("tell", "was not ready after 10s")
			s.expect(map[string]string{"NRestarts": restarts})
			s.reload()
		})
		s.load.end()
		s.load = nil
		// As the documentation says.
		s.change("NotifyAccess=all")
		s.phase("All", tolerance{warnings: exited + "|Reload failed"}, func() {
			old := strconv.Itoa(s.main)
			version := s.install("tell")
			s.restarted(version, func() {
				s.systemctl("reload", "--no-block", s.service)
				s.await("MainPID", func(pid string) bool { return pid != old })
			})
		})
	})
}

// Type=notify-reload waits for the end of the upgrade.
func TestNotifyReload(t *testing.T) {
	leaveToLong(t)
	onMachine(t, func(t *testing.T) {
		if v := systemdVersion(t); v < 253 {
			t.Skipf("systemd %d has no Type=notify-reload", v)
		}
		s := newService(t, notify)
		s.change("Type=notify-reload", "ExecReload=")
		s.phase("Start", tolerance{}, s.start)
		s.load = startLoad(t)
		s.phase("Reload", tolerance{}, func() {
			for range 10 {
				old := s.main
				s.version = s.install("good")
				s.systemctl("reload", s.service)
				s.adopt() // it need not be waited for
				if s.main == old {
					s.t.Fatal("systemctl reload has returned before the upgrade")
				}
				s.awaitEnd(old)
				s.awaitAnswers()
				s.expectRunning()
			}
		})
		s.phase("ReloadFails", tolerance{}, func() {
			s.failReload("fail", "exited before it was ready")
			s.reload()
		})
		s.load.end()
		s.load = nil
		s.phase("Stop", tolerance{}, s.stop)
	})
}

func systemdVersion(t *testing.T) int {
	t.Helper()
	output := string(journalctl(t, "--version"))
	number := regexp.MustCompile(`^systemd (\d+)`).FindStringSubmatch(output)
	if number == nil {
		t.Fatalf("journalctl --version says %s", output)
	}
	version, err := strconv.Atoi(number[1])
	proctest.OK(t, err)
	return version
}

// A service of which systemd follows only the first process is not upgraded, because it
// would end with that process.
func TestSimple(t *testing.T) {
	leaveToLong(t)
	onMachine(t, func(t *testing.T) {
		s := newService(t, kind{service: "simple.service"})
		unit := "[Service]\nExecStart=" + installed + "\nExecReload=/bin/kill -HUP $MAINPID\n"
		proctest.OK(t, os.WriteFile(filepath.Join(units, s.service), []byte(unit), 0o644))
		s.systemctl("daemon-reload")
		s.phase("Start", tolerance{}, s.start)
		s.load = startLoad(t)
		s.phase("Reload", tolerance{}, func() {
			for range 2 {
				s.failReload("good", "set Type=notify in the unit, or PIDFile=")
			}
		})
		s.load.end()
		s.load = nil
		s.phase("Stop", tolerance{}, s.stop)
	})
}
