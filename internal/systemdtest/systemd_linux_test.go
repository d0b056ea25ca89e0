// Package systemdtest tests the library under a real systemd, with the units of
// examples/deploy/systemd, as they are.
package systemdtest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
)

func TestNotify(t *testing.T) {
	onMachine(t, notify.run)
}

func TestPIDFile(t *testing.T) {
	onMachine(t, pidFile.run)
}

func TestActivated(t *testing.T) {
	onMachine(t, activated.run)
}

func TestStore(t *testing.T) {
	onMachine(t, stored.run)
}

// A new process need not be the one that the upgrade has started.
func TestWrapper(t *testing.T) {
	onMachine(t, func(t *testing.T) {
		for _, wrapper := range []struct{ name, script string }{
			{"Exec", `exec "$@"`},
			{"Background", `"$@" &`},
		} {
			t.Run(wrapper.name, func(t *testing.T) {
				s := newService(t, notify)
				s.systemctl("set-environment", "WRAPPER="+wrapper.script)
				s.phase("Start", tolerance{}, s.start)
				s.load = startLoad(t)
				s.phase("Reload", tolerance{}, func() {
					s.reload()
					s.reload()
				})
				s.phase("ReloadFails", tolerance{}, func() {
					s.failReload("fail", "exited before it was (ready|in charge)|was not ready")
				})
				s.load.end()
				s.load = nil
				s.phase("Stop", tolerance{}, s.stop)
			})
		}
	})
}

const reloads = 20

func (k kind) run(t *testing.T) {
	s := newService(t, k)
	s.phase("Start", tolerance{}, s.start)
	s.phase("ReloadIdle", tolerance{}, func() {
		for range 3 {
			s.reload()
		}
	})
	if k.notifies {
		s.phase("ReloadDeaf", tolerance{}, s.reloadDeaf)
	}
	s.load = startLoad(t)
	s.phase("Reload", tolerance{}, func() {
		for range reloads {
			s.reload()
		}
	})
	s.phase("ReloadFails", tolerance{}, func() {
		s.failReload("fail", "exited before it was ready: (exit status 1|exit status unknown)")
		s.reload()
	})
	s.phase("ReloadHangs", tolerance{}, func() {
		s.failReload("hang", "was not ready after 10s")
		s.reload()
	})
	s.phase("KillDraining", tolerance{cut: true}, s.killDraining)

	// Without its sockets, what waits in their queues is lost.
	loses := !k.keepsSockets
	s.phase("QuitAfterReload", tolerance{loses, loses, exited + "|Reload failed|does not exist or is a zombie"}, s.quit)
	s.phase("KillDuringReload", tolerance{loses, true, exited + "|Reload failed"}, s.killReloading)
	s.phase("Kill", tolerance{loses, true, exited}, func() {
		s.kill()
		if k.keepsSockets {
			for range 6 { // more than the usual StartLimitBurst=
				s.kill()
			}
		}
	})
	s.phase("Reload", tolerance{}, s.reload)
	loses = k.socket == "" // Stop empties the store
	s.phase("Restart", tolerance{refused: loses, cut: loses}, s.restart)
	s.phase("Reload", tolerance{}, s.reload)

	s.load.end()
	s.load = nil
	s.phase("Stop", tolerance{}, s.stop)
}

// exited matches what systemd says of the death of the main process.
const exited = "Main process exited|Failed with result '(exit-code|signal)'"

// start starts the service, by its first connection if it is activated.
func (s *service) start() {
	if s.supervised {
		s.startSupervised()
		return
	}
	s.version = s.install("good")
	s.systemctl("start", s.units()[0])
	if s.socket != "" {
		s.expect(map[string]string{"ActiveState": "inactive"})
	}
	s.awaitFirst()
}

// awaitFirst waits until the first process of the service answers.
func (s *service) awaitFirst() {
	s.t.Helper()
	proctest.AwaitThat(s.t, "the service answers", func() bool {
		response, err := oneShot.Get("http://" + tcpAddr)
		if err != nil {
			if s.socket != "" || s.notifies {
				s.t.Fatal(err)
			}
			return false
		}
		response.Body.Close()
		return true
	})
	s.adopt()
	s.expectRunning()
}

// adopt takes the main process that systemd names for the process in charge.
func (s *service) adopt() {
	s.setMain(s.show()["MainPID"])
}

func (s *service) setMain(pid string) {
	s.main, _ = strconv.Atoi(pid)
	s.inCharge[s.version+" "+pid] = true
}

// reload upgrades to a new version.
func (s *service) reload() {
	s.t.Helper()
	s.reloadTo(s.install("good"))
}

// reloadTo upgrades to the version that is installed.
func (s *service) reloadTo(version string) {
	s.t.Helper()
	restarts := s.show()["NRestarts"]
	s.version = version
	old := s.main
	s.systemctl("reload", s.service)
	// It is 0 for a moment if systemd learns of the new one when the old one has ended.
	s.await("MainPID", func(pid string) bool { return pid != strconv.Itoa(old) && pid != "0" })
	s.adopt()
	s.awaitEnd(old)
	s.awaitAnswers()
	s.expectRunning()
	s.expect(map[string]string{"NRestarts": restarts, "StatusText": ""})
	if s.t.Failed() {
		s.t.FailNow()
	}
}

// reloadDeaf upgrades while systemd reads nothing. The old process must not end before
// systemd has read the new main PID, because systemd ignores messages of dead processes.
func (s *service) reloadDeaf() {
	old := s.main
	s.version = s.install("good")
	proctest.Kill(s.t, managerPID, syscall.SIGSTOP)
	proctest.Kill(s.t, old, syscall.SIGHUP)
	proctest.AwaitThat(s.t, "two processes run", func() bool { return len(processes()) == 2 })
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) { // a poll
		if proctest.IsZombie(old) { // it is systemd that reaps
			s.t.Error("the old process has ended")
			break
		}
	}
	proctest.Kill(s.t, managerPID, syscall.SIGCONT)
	s.await("MainPID", func(pid string) bool { return pid != strconv.Itoa(old) })
	s.adopt()
	s.awaitEnd(old)
	s.awaitAnswers()
	s.expectRunning()
}

// failReload tries to upgrade to a version that can't take over, and returns when
// the service has said why, a regular expression.
func (s *service) failReload(behaviour, why string) {
	s.t.Helper()
	cursor := journalCursor(s.t)
	failure := regexp.MustCompile("upgrade failed.*" + why)
	s.install(behaviour)
	s.systemctl("reload", "--no-block", s.service)
	if behaviour == "hang" && s.notifies {
		// At first, kill runs.
		proctest.AwaitThat(s.t, "the service has said that it is reloading", func() bool {
			properties := s.show()
			return properties["ActiveState"] == "reloading" && properties["ControlPID"] == "0"
		})
	}
	if s.notifies {
		s.await("StatusText", failure.MatchString)
	}
	proctest.AwaitThat(s.t, "the service logs the failure", func() bool {
		for _, e := range journal(s.t, cursor) {
			if e.PID == strconv.Itoa(s.main) && failure.MatchString(e.Message) {
				return true
			}
		}
		return false
	})
	s.await("ActiveState", equal("active")) // kill may run longer than the upgrade
	s.load.settle(s.t)
	s.expectRunning()
}

// oneShot leaves no connection that a drain would wait for.
var oneShot = http.Client{Timeout: proctest.Patience, Transport: &http.Transport{DisableKeepAlives: true}}

// awaitAnswers waits until the process in charge answers.
func (s *service) awaitAnswers() {
	s.t.Helper()
	if s.load != nil {
		s.load.awaitAnswers(s.t, s.version, s.main)
		return
	}
	response, err := oneShot.Get("http://" + tcpAddr)
	proctest.OK(s.t, err)
	expectAnswer(s.t, response, s.version, s.main)
}

func expectAnswer(t *testing.T, response *http.Response, version string, pid int) {
	t.Helper()
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if want := fmt.Sprintf("%s %d ", version, pid); err != nil || string(answer) != want {
		t.Errorf("got the answer %q, error %v, want %q", answer, err, want)
	}
}

// hold makes a request that the process in charge begins to answer.
func (s *service) hold(until string) *http.Response {
	s.t.Helper()
	response, err := oneShot.Get("http://" + tcpAddr + "/?hold=" + until)
	proctest.OK(s.t, err)
	return response
}

// killDraining kills the old process while a request keeps it from exiting, for which a
// second upgrade waits.
func (s *service) killDraining() {
	response := s.hold("forever")
	defer response.Body.Close()
	old, queued := s.main, ""
	s.version = s.install("good")
	s.systemctl("reload", s.service)
	if s.notifies {
		s.await("MainPID", func(pid string) bool { return pid != strconv.Itoa(old) })
		s.adopt()
		s.expectRunning(old)
		s.awaitAnswers()
		queued = s.install("good")
		s.systemctl("reload", s.service)
		s.await("StatusText", equal("upgrade queued"))
		s.expectRunning(old)
	} else {
		proctest.AwaitThat(s.t, "the PID file names the new process", func() bool {
			content, err := os.ReadFile("/run/web.pid")
			if err != nil || string(content) == strconv.Itoa(old) {
				return false
			}
			s.setMain(string(content))
			return true
		})
	}
	s.awaitAnswers()
	proctest.Kill(s.t, old, syscall.SIGKILL)
	s.awaitEnd(old)
	if s.notifies {
		old, s.version = s.main, queued
		s.await("MainPID", func(pid string) bool { return pid != strconv.Itoa(old) })
		s.adopt()
		s.awaitEnd(old)
		s.awaitAnswers()
	} else {
		s.await("MainPID", equal(strconv.Itoa(s.main)))
	}
	s.load.settle(s.t)
	s.expectRunning()
}

// quit upgrades to a version that ends as soon as it is in charge. The reload fails if kill,
// in ExecReload=, ends after that.
func (s *service) quit() {
	version := s.install("quit")
	s.restarted(version, func() { s.systemctl("reload", "--no-block", s.service) })
}

// kill kills the main process.
func (s *service) kill() {
	s.restarted(s.version, func() { proctest.Kill(s.t, s.main, syscall.SIGKILL) })
}

// killReloading kills the main process while another starts.
func (s *service) killReloading() {
	version := s.install("hang") // not when systemd starts it
	s.systemctl("reload", "--no-block", s.service)
	proctest.AwaitThat(s.t, "two processes run", func() bool { return len(processes()) == 2 })
	s.restarted(version, func() { proctest.Kill(s.t, s.main, syscall.SIGKILL) })
}

// restarted waits until systemd has brought the service back from what do does.
func (s *service) restarted(version string, do func()) {
	s.t.Helper()
	before, _ := strconv.Atoi(s.show()["NRestarts"])
	s.version = version
	do()
	s.await("NRestarts", equal(strconv.Itoa(before+1)))
	s.await("SubState", equal("running"))
	s.adopt()
	s.awaitAnswers()
	s.expectRunning()
}

func (s *service) restart() {
	response, version, old := s.hold("drain"), s.version, s.main
	s.version = s.install("good")
	s.systemctl("restart", s.service)
	expectAnswer(s.t, response, version, old)
	s.adopt()
	if s.main == old {
		s.t.Errorf("process %d is still the main process", old)
	}
	s.awaitAnswers()
	s.expectRunning()
}

func (s *service) stop() {
	group := "/sys/fs/cgroup" + s.show()["ControlGroup"]
	if _, err := os.Stat(group); err != nil {
		s.t.Error(err)
	}
	response := s.hold("drain")
	s.systemctl(append([]string{"stop"}, s.units()...)...)
	expectAnswer(s.t, response, s.version, s.main)
	s.expect(map[string]string{
		"MainPID":              "0",
		"ActiveState":          "inactive",
		"SubState":             "dead",
		"Result":               "success",
		"NFileDescriptorStore": "0",
	})
	s.awaitNobody()
	gone := []string{group, "/run/web.pid"}
	if s.socket == "" {
		gone = append(gone, unixPath)
	} else if _, err := os.Lstat(unixPath); err != nil {
		s.t.Errorf("the socket file that systemd made is gone: %v", err)
	}
	for _, path := range gone {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			s.t.Errorf("%s is left behind: %v", path, err)
		}
	}
	if conn, err := net.Dial("tcp", tcpAddr); err == nil {
		conn.Close()
		s.t.Error("somebody still listens")
	}
}
