//go:build unix

// Package exampletest runs the example in the current directory as a service: it
// builds it as v1 and v2, starts it, replaces its binary, and sends it the signals
// that its users send. The service is watched from outside: by its log, its PID
// file, its processes and its answers.
//
// It extends package proctest, and uses its vocabulary, for what the examples share: they
// are built, they log every step, and they answer with their version and their PID.
package exampletest

import (
	"bufio"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
)

// binaries holds the versions. It is filled by the first Start, and removed by Main.
var binaries string

var build = sync.OnceValue(func() error {
	for _, version := range []string{"v1", "v2"} {
		command := exec.Command("go", "build", "-ldflags", "-X main.version="+version, "-o", builtBinary(version))
		if output, err := command.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", command, err, output)
		}
	}
	return nil
})

func builtBinary(version string) string { return filepath.Join(binaries, version) }

// Main is what a TestMain must call. It does not return.
func Main(m *testing.M) {
	err := proctest.AdoptOrphans()
	if err == nil {
		binaries, err = os.MkdirTemp("", "exampletest")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := m.Run()
	os.RemoveAll(binaries)
	os.Exit(status)
}

// A Service is all generations of one example. Its methods fail the test if what
// they wait for does not happen, and are for the test's goroutine.
type Service struct {
	t       *testing.T
	binary  string
	pidFile string
	version string // the one that was installed last
	addr    string
	log     proctest.Journal[record] // ends once no process of the service runs
	pids    proctest.PIDs            // of those that have logged

	generations []*generation
	ended       map[int]bool
}

// A generation answers at most from began to ended, as far as can be seen from outside.
type generation struct {
	pid     int
	version string
	began   time.Time // before it was started
	retired time.Time // before it was told to end
	ended   time.Time // after it had ended
}

// Start starts v1 with these flags added, and waits until it is ready. At the end
// of the test it kills what is left, and fails the test if the service has logged
// a warning or an error that was not awaited.
func Start(t *testing.T, flags ...string) *Service {
	t.Helper()
	proctest.OK(t, build())
	dir := t.TempDir()
	s := &Service{
		t:       t,
		binary:  filepath.Join(dir, "service"),
		pidFile: filepath.Join(dir, "pid"),
		ended:   map[int]bool{},
	}
	s.Install("v1")

	read, write, err := os.Pipe()
	proctest.OK(t, err)
	go s.readLog(read)
	t.Cleanup(s.cleanUp)

	command := exec.Command(s.binary, append([]string{"-listen", "localhost:0", "-pid-file", s.pidFile}, flags...)...)
	command.Stderr = write
	began := time.Now()
	err = command.Start()
	write.Close()
	proctest.OK(t, err)
	// It is waited for like its descendants, by its process ID.
	pid := command.Process.Pid
	s.pids.Add(pid)
	proctest.OK(t, command.Process.Release())
	s.generations = []*generation{{pid: pid, version: s.version, began: began}}
	s.addr = s.Await(pid, "listening")["addr"]
	s.Await(pid, "ready")
	if got := s.PID(); got != pid {
		t.Fatalf("the PID file of process %d names %d", pid, got)
	}
	return s
}

// Addr is where the service listens.
func (s *Service) Addr() string { return s.addr }

// PID returns what the PID file says.
func (s *Service) PID() int {
	s.t.Helper()
	content, err := os.ReadFile(s.pidFile)
	proctest.OK(s.t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(content)))
	proctest.OK(s.t, err)
	return pid
}

// Install puts v1 or v2 where the service's binary is.
func (s *Service) Install(version string) {
	s.t.Helper()
	content, err := os.ReadFile(builtBinary(version))
	proctest.OK(s.t, err)
	s.Replace(string(content), 0o755)
	s.version = version
}

// Replace puts a file where the service's binary is, by renaming.
func (s *Service) Replace(content string, mode fs.FileMode) {
	s.t.Helper()
	proctest.OK(s.t, os.WriteFile(s.binary+".new", []byte(content), mode))
	proctest.OK(s.t, os.Rename(s.binary+".new", s.binary))
}

// Upgrade sends SIGHUP to the process in charge, and waits until the one that it
// starts is in charge. It returns the PIDs of both.
func (s *Service) Upgrade() (retired, inCharge int) {
	s.t.Helper()
	old := s.generations[len(s.generations)-1]
	old.retired = time.Now()
	s.Signal(old.pid, syscall.SIGHUP)
	took := s.Await(old.pid, "upgrade succeeded")["took"]
	if d, err := time.ParseDuration(took); err != nil || d <= 0 {
		s.t.Errorf("the upgrade took %q", took)
	}
	pid := s.PID()
	if pid == old.pid {
		s.t.Fatalf("the PID file still names %d after the upgrade", pid)
	}
	s.generations = append(s.generations, &generation{pid: pid, version: s.version, began: old.retired})
	s.Await(pid, "ready")
	return old.pid, pid
}

// FailUpgrade sends SIGHUP, waits until the service logs that the upgrade has failed, and
// returns the error.
func (s *Service) FailUpgrade() string {
	s.t.Helper()
	pid := s.PID()
	s.Signal(pid, syscall.SIGHUP)
	failure := s.Await(pid, "upgrade failed")["error"]
	if got := s.PID(); got != pid {
		s.t.Errorf("after the failure the PID file names %d instead of %d", got, pid)
	}
	return failure
}

// Stop sends SIGTERM to the process in charge and waits until it has drained and
// removed its PID file, and has exited with status 0.
func (s *Service) Stop() {
	s.t.Helper()
	pid := s.PID()
	s.generations[len(s.generations)-1].retired = time.Now()
	s.Signal(pid, syscall.SIGTERM)
	s.AwaitEnd(pid, 0)
	s.Await(pid, "drained")
	if proctest.Exists(s.pidFile) {
		s.t.Error("after Stop the PID file is still there")
	}
}

// Signal sends a signal to one process of the service.
func (s *Service) Signal(pid int, signal syscall.Signal) {
	s.t.Helper()
	proctest.Kill(s.t, pid, signal)
}

// AwaitEnd waits until a process of the service has ended, with this exit status
// unless the platform keeps it from us.
func (s *Service) AwaitEnd(pid, status int) {
	s.t.Helper()
	got, known := s.awaitEnd(pid)
	if known && (!got.Exited() || got.ExitStatus() != status) {
		s.t.Errorf("process %d ended with wait status %#x, want exit status %d", pid, int(got), status)
	}
}

// AwaitKilled waits until a process of the service has ended by this signal.
func (s *Service) AwaitKilled(pid int, signal syscall.Signal) {
	s.t.Helper()
	got, known := s.awaitEnd(pid)
	if known && (!got.Signaled() || got.Signal() != signal) {
		s.t.Errorf("process %d ended with wait status %#x, want %v", pid, int(got), signal)
	}
}

func (s *Service) awaitEnd(pid int) (status syscall.WaitStatus, known bool) {
	s.t.Helper()
	proctest.AwaitThat(s.t, fmt.Sprintf("process %d has ended", pid), func() (ended bool) {
		status, known, ended = proctest.Ended(pid)
		return ended
	})
	s.ended[pid] = true
	s.pids.Remove(pid)
	for _, g := range s.generations {
		if g.pid == pid {
			g.ended = time.Now()
		}
	}
	return status, known
}

// Interrupt waits until a process that drains, and would not end by itself, has cut what
// was left and ended with status 1, by the second SIGINT. Before that it gets SIGTERMs,
// which must not end it.
func (s *Service) Interrupt(pid int) {
	s.t.Helper()
	for range 3 {
		s.Signal(pid, syscall.SIGTERM)
	}
	s.Signal(pid, syscall.SIGINT)
	s.Await(pid, "interrupted") // The kernel makes one of two that it has not delivered yet.
	s.Signal(pid, syscall.SIGINT)
	s.AwaitEnd(pid, 1)
	s.Await(pid, "exiting")
}

// A record is a line of the log.
type record struct {
	line  string
	attrs map[string]string
	seen  bool
}

func (s *Service) readLog(from *os.File) {
	defer from.Close()
	defer s.log.End()
	lines := bufio.NewScanner(from)
	for lines.Scan() {
		r := record{line: lines.Text(), attrs: parse(lines.Text())}
		if pid, err := strconv.Atoi(r.attrs["pid"]); err == nil && pid > 0 {
			s.pids.Add(pid)
		}
		s.log.Add(r)
	}
}

// parse reads a line of slog's TextHandler. The first of several attributes with
// one key counts, which for "pid" is that of the process that logs.
func parse(line string) map[string]string {
	attrs := map[string]string{}
	for {
		key, rest, ok := strings.Cut(strings.TrimLeft(line, " "), "=")
		if !ok {
			return attrs
		}
		value, err := strconv.QuotedPrefix(rest)
		if err == nil {
			line = rest[len(value):]
			value, _ = strconv.Unquote(value)
		} else {
			value, line, _ = strings.Cut(rest, " ")
		}
		if _, ok := attrs[key]; !ok {
			attrs[key] = value
		}
	}
}

// Await returns the attributes of the first record with this message from this
// process that was not awaited before. Zero is any process.
func (s *Service) Await(pid int, msg string) map[string]string {
	s.t.Helper()
	var found map[string]string
	s.log.Await(s.t, fmt.Sprintf("%q from process %d", msg, pid), func(records []record) bool {
		for i, r := range records {
			if !r.seen && r.attrs["msg"] == msg && (pid == 0 || r.attrs["pid"] == strconv.Itoa(pid)) {
				records[i].seen = true
				found = r.attrs
				return true
			}
		}
		return false
	})
	return found
}

func (s *Service) cleanUp() {
	running := s.t.Failed()
	for _, g := range s.generations {
		running = running || !s.ended[g.pid]
	}
	if running {
		s.pids.Kill()
	}
	if !s.log.AwaitEnd() {
		s.t.Error("processes of this service are still running")
		s.pids.Kill()
	}
	for _, r := range s.log.All() {
		// The service logs the error of a failed upgrade, too, and that is awaited.
		repeated := r.attrs["msg"] == "tableflip: failed"
		if level := r.attrs["level"]; !r.seen && !repeated && (level == "WARN" || level == "ERROR") {
			s.t.Errorf("the service logged: %s", r.line)
		}
	}
	if s.t.Failed() {
		for _, r := range s.log.All() {
			s.t.Log(r.line)
		}
	}
}

// A Result is what came of one exchange of a client with the service.
type Result struct {
	Began, Ended time.Time
	Answer       string
	Err          error
}

// A Load is clients at work.
type Load struct {
	results proctest.Journal[Result]
	clients sync.WaitGroup
	stop    chan struct{}
}

// pace is how often a client begins an exchange: often enough that all moments of
// an upgrade meet some, seldom enough that the ports of closed connections last.
const pace = 2 * time.Millisecond

// A Client is one user of the service. Its methods are called in one goroutine.
type Client interface {
	// Exchange asks the service something. The answer begins with
	// "version=VERSION pid=PID".
	Exchange() (answer string, err error)
	// Leave is called after the last exchange.
	Leave() error
}

// ClientFunc is a client that keeps nothing between two exchanges.
type ClientFunc func() (answer string, err error)

func (f ClientFunc) Exchange() (answer string, err error) { return f() }
func (f ClientFunc) Leave() error                         { return nil }

// StartLoad has each client exchange again and again, until Stop, or the end of
// the test.
func (s *Service) StartLoad(clients ...Client) *Load {
	load := &Load{stop: make(chan struct{})}
	for _, client := range clients {
		load.clients.Go(func() {
			next := time.NewTicker(pace)
			defer next.Stop()
			for {
				began := time.Now()
				answer, err := client.Exchange()
				load.results.Add(Result{began, time.Now(), answer, err})
				select {
				case <-next.C:
				case <-load.stop:
					if err := client.Leave(); err != nil {
						s.t.Errorf("a client could not leave: %v", err)
					}
					return
				}
			}
		})
	}
	s.t.Cleanup(func() { load.Stop() })
	return load
}

// Stop returns the results of all exchanges once those under way have ended.
func (l *Load) Stop() []Result {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	l.clients.Wait()
	return l.results.All()
}

// AwaitMore waits for the results of so many exchanges that begin from now on.
func (s *Service) AwaitMore(l *Load, exchanges int) {
	s.t.Helper()
	now := time.Now()
	l.results.Await(s.t, "answers", func(results []Result) bool {
		n := 0
		for _, r := range slices.Backward(results) {
			if r.Ended.Before(now) {
				break
			}
			if r.Began.After(now) {
				n++
			}
		}
		return n >= exchanges
	})
}

// WantAnswered fails the test for every exchange that failed, unless an old generation
// was on its way out meanwhile and excuse, which may be nil, accepts the error;
// and for every answer that came from a process that was not in charge then, or
// from the wrong version. It returns the number of answers of each generation.
func (s *Service) WantAnswered(results []Result, excuse func(error) bool) map[int]int {
	s.t.Helper()
	answers := map[int]int{}
	excused := 0
	for _, r := range results {
		if r.Err != nil {
			if excuse != nil && excuse(r.Err) && s.meetsDrain(r) {
				excused++
			} else {
				s.t.Errorf("an exchange failed: %v", r.Err)
			}
			continue
		}
		var version string
		var pid int
		if _, err := fmt.Sscanf(r.Answer, "version=%s pid=%d", &version, &pid); err != nil {
			s.t.Errorf("got the answer %q: %v", r.Answer, err)
			continue
		}
		answers[pid]++
		i := slices.IndexFunc(s.generations, func(g *generation) bool { return g.pid == pid })
		if i < 0 {
			s.t.Errorf("got the answer %q, which is from none of %v", r.Answer, slices.Sorted(maps.Keys(answers)))
			continue
		}
		g := s.generations[i]
		if version != g.version {
			s.t.Errorf("got the answer %q, want version %s", r.Answer, g.version)
		}
		if r.Ended.Before(g.began) || !g.ended.IsZero() && r.Began.After(g.ended) {
			s.t.Errorf("got the answer %q at a time when that process was not running", r.Answer)
		}
	}
	if excused > 0 {
		s.t.Logf("%d of %d exchanges failed while a process drained", excused, len(results))
	}
	return answers
}

func (s *Service) meetsDrain(r Result) bool {
	return slices.ContainsFunc(s.generations, func(g *generation) bool {
		return !g.retired.IsZero() && r.Ended.After(g.retired) && (g.ended.IsZero() || r.Began.Before(g.ended))
	})
}

// UpgradeUnderLoad upgrades from v1 to v2 and back, twenty times in all, while the
// clients are at work, and stops the service. All generations must answer, and all exchanges
// succeed that excuse does not accept as WantAnswered says.
func (s *Service) UpgradeUnderLoad(excuse func(error) bool, clients ...Client) {
	s.t.Helper()
	load := s.StartLoad(clients...)
	s.AwaitMore(load, 20)
	for i := range 20 {
		s.Install([]string{"v2", "v1"}[i%2])
		old, inCharge := s.Upgrade()
		s.AwaitEnd(old, 0)
		s.Await(old, "drained")
		s.AwaitMore(load, 20)
		if got := s.PID(); got != inCharge {
			s.t.Errorf("the PID file names %d, want %d", got, inCharge)
		}
	}
	results := load.Stop()
	s.t.Logf("%d exchanges in 20 upgrades", len(results))
	answers := s.WantAnswered(results, excuse)
	for _, g := range s.generations {
		if answers[g.pid] < 20 {
			s.t.Errorf("%d answers from process %d, want at least 20", answers[g.pid], g.pid)
		}
	}
	s.Stop()
}

// SurviveFailures replaces the binary by ones that cannot take over, while the
// clients are at work, then by v2, and upgrades. No exchange may fail before that.
func (s *Service) SurviveFailures(clients ...Client) {
	s.t.Helper()
	load := s.StartLoad(clients...)
	s.AwaitMore(load, 20)
	for _, bad := range []struct {
		binary string
		mode   fs.FileMode
		want   string
	}{
		{"#!/bin/sh\nexit 1\n", 0o755, "exit status 1"},
		{"#!/bin/sh\nkill -KILL $$\n", 0o755, "killed"},
		{"#!/bin/sh\nexit 1\n", 0o644, "permission denied"},
		{"not a program", 0o755, "exec format error"},
	} {
		s.Replace(bad.binary, bad.mode)
		if got := s.FailUpgrade(); !strings.Contains(got, bad.want) {
			s.t.Errorf("the upgrade failed with %q, want %q", got, bad.want)
		}
		s.AwaitMore(load, 20)
	}
	s.WantAnswered(load.Stop(), nil)

	s.Install("v2")
	old, _ := s.Upgrade()
	s.AwaitEnd(old, 0)
	s.Await(old, "drained")
	load = s.StartLoad(clients...)
	s.AwaitMore(load, 20)
	s.WantAnswered(load.Stop(), nil)
	s.Stop()
}
