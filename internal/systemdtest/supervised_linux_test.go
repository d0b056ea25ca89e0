package systemdtest

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	_ "example.com/tableflip/supervise" // so that go test knows that the result depends on it

	"example.com/tableflip/internal/proctest"
)

// This file owns the service under tableflip-supervise, and the signals that systemd
// sends more than once.

func TestSupervised(t *testing.T) {
	onMachine(t, func(t *testing.T) {
		s := newService(t, supervised)
		s.phase("Start", tolerance{}, s.start)
		s.load = startLoad(t)
		s.phase("Reload", tolerance{}, func() {
			for range 5 {
				old := s.main
				s.reloadSupervised()
				s.awaitEnd(old)
			}
		})
		s.load.end()
		s.load = nil
		s.phase("CrashWhileDraining", tolerance{warnings: exited}, s.crashWhileDraining)
		s.phase("StopTwice", tolerance{}, s.stopTwice)
		s.phase("Start", tolerance{}, s.start)
		s.phase("StopTwiceAfterReload", tolerance{}, func() { s.stopTwiceAfter(s.reloadDraining) })
	})
}

// Each process gets SIGTERM three times, and answers what it has begun.
func TestStopTwice(t *testing.T) {
	onMachine(t, func(t *testing.T) {
		s := newService(t, notify)
		s.phase("Start", tolerance{}, s.start)
		s.phase("StopTwice", tolerance{}, s.stopTwice)
		s.phase("Start", tolerance{}, s.start)
		s.phase("StopTwiceAfterReload", tolerance{}, func() {
			s.stopTwiceAfter(s.reloadDraining)
		})
	})
}

func (s *service) startSupervised() {
	const supervisor = "tableflip-supervise"
	content, err := os.ReadFile(filepath.Join(binaries, supervisor))
	if err == nil {
		path := filepath.Join(filepath.Dir(installed), supervisor)
		if _, err = os.Stat(path); err != nil {
			err = os.WriteFile(path, content, 0o755)
		}
	}
	proctest.OK(s.t, err)
	s.version = s.install("good")
	s.systemctl("start", s.service)
	s.askMain()
}

// askMain waits until the version that was installed last answers, and records it as the
// process in charge.
func (s *service) askMain() {
	s.t.Helper()
	proctest.AwaitThat(s.t, s.version+" answers", func() bool {
		response, err := oneShot.Get("http://" + tcpAddr)
		if err != nil {
			return false
		}
		defer response.Body.Close()
		answer, err := io.ReadAll(response.Body)
		var version string
		var pid int
		if n, _ := fmt.Sscan(string(answer), &version, &pid); n != 2 || err != nil || version != s.version {
			return false
		}
		s.setMain(strconv.Itoa(pid))
		return true
	})
}

// reloadSupervised upgrades, and does not wait for the end of the old process.
func (s *service) reloadSupervised() {
	s.t.Helper()
	before := s.show()
	s.reloadDraining()
	s.expect(map[string]string{"MainPID": before["MainPID"], "NRestarts": before["NRestarts"]})
}

// reloadDraining upgrades, and waits for the new process alone.
func (s *service) reloadDraining() {
	s.t.Helper()
	old := s.main
	s.version = s.install("good")
	s.systemctl("reload", s.service)
	s.askMain()
	proctest.AwaitThat(s.t, "the old process accepts no more", func() bool { return old == s.main || !listens(old) })
	if s.notifies && !s.supervised {
		s.await("MainPID", equal(strconv.Itoa(s.main)))
	}
	s.await("ActiveState", equal("active"))
}

// listens reports whether a process has a TCP socket that listens. See proc_pid_net(5).
func listens(pid int) bool {
	descriptors, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, table := range []string{"tcp", "tcp6"} {
		content, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		for line := range strings.Lines(string(content)) {
			columns := strings.Fields(line)
			if columns[3] == "0A" && slices.ContainsFunc(descriptors, func(d string) bool {
				target, _ := os.Readlink(d)
				return target == "socket:["+columns[9]+"]"
			}) {
				return true
			}
		}
	}
	return false
}

// crashWhileDraining has a new version crash while the old one cannot end.
func (s *service) crashWhileDraining() {
	response := s.hold("forever")
	defer response.Body.Close()
	s.reloadDraining()
	restarts, _ := strconv.Atoi(s.show()["NRestarts"])
	began := time.Now()
	proctest.Kill(s.t, s.main, syscall.SIGKILL)
	s.askMain()
	// The drain would have been 30 s.
	if outage := time.Since(began); outage > 25*time.Second {
		s.t.Errorf("nobody answered for %v", outage)
	} else {
		s.t.Logf("nobody answered for %v", outage)
	}
	s.await("NRestarts", equal(strconv.Itoa(restarts+1)))
}

// An unfinished request is one that a process has begun to read.
type unfinished struct {
	body    *io.PipeWriter
	answers chan string
	want    string
}

func (s *service) begin() *unfinished {
	s.t.Helper()
	read, write := io.Pipe()
	u := &unfinished{write, make(chan string, 1), fmt.Sprintf("%s %d hello", s.version, s.main)}
	request, err := http.NewRequest(http.MethodPost, "http://"+tcpAddr, read)
	proctest.OK(s.t, err)
	request.Header.Set("Expect", "100-continue")
	transport := &http.Transport{DisableKeepAlives: true, ExpectContinueTimeout: proctest.Patience}
	ctx, cancel := context.WithTimeout(context.Background(), 2*proctest.Patience)
	go func() {
		defer cancel()
		response, err := transport.RoundTrip(request.WithContext(ctx))
		if err != nil {
			read.CloseWithError(err)
			u.answers <- err.Error()
			return
		}
		defer response.Body.Close()
		answer, err := io.ReadAll(response.Body)
		u.answers <- fmt.Sprint(string(answer), map[bool]string{true: " " + fmt.Sprint(err)}[err != nil])
	}()
	// The body is asked for when the service reads it.
	if _, err := io.WriteString(write, "hel"); err != nil {
		s.t.Fatal(err)
	}
	return u
}

func (u *unfinished) finish(t *testing.T) {
	t.Helper()
	if answer := u.complete(); answer != u.want {
		t.Errorf("got the answer %q, want %q", answer, u.want)
	}
}

// complete sends the rest, and returns the answer or an error's text.
func (u *unfinished) complete() string {
	io.WriteString(u.body, "lo")
	u.body.Close()
	return <-u.answers
}

func (s *service) stopTwice() { s.stopTwiceAfter(func() {}) }

func (s *service) stopTwiceAfter(change func()) {
	s.t.Helper()
	requests := []*unfinished{s.begin()}
	if change(); requests[0].want != fmt.Sprintf("%s %d hello", s.version, s.main) {
		requests = append(requests, s.begin())
	}
	terminate := func() { s.systemctl("kill", "--signal=TERM", "--kill-whom=all", s.service) }
	terminate()
	proctest.AwaitThat(s.t, "the service accepts no more", func() bool {
		conn, err := net.Dial("tcp", tcpAddr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	s.systemctl("stop", "--no-block", s.service)
	s.await("SubState", equal("stop-sigterm"))
	terminate()
	for _, request := range requests {
		request.finish(s.t)
	}
	s.await("ActiveState", equal("inactive"))
	s.expect(map[string]string{"Result": "success", "ExecMainStatus": "0"})
	s.awaitNobody()
}
