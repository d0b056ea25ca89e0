//go:build unix

package tableflip_test

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/step"
)

// The tests' processes are this binary, started again with a role: the name of a
// function in roles. What a role has to say, it reports, as a line on standard
// output, to the service that its test holds.
//
// A test is either the parent itself (newParent) and gives its child a role, or
// starts the first generation in a role too (startService).

const (
	roleVariable  = "TABLEFLIP_TEST_ROLE"
	faultVariable = "TABLEFLIP_TEST_FAULT"

	// patience bounds every wait for an event. No test passes because of it.
	patience = 30 * time.Second
)

// roles is filled by the init functions of the test files. A role ends its
// process with status 0 by returning and with status 2 by a panic.
var roles = map[string]func(){}

func TestMain(m *testing.M) {
	// The race detector would have every process sleep for a second at its end. Of
	// most of those started from here nobody looks at the exit status: they end at
	// the first race, and their tests fail for want of them.
	os.Setenv("GORACE", "atexit_sleep_ms=0 halt_on_error=1 "+os.Getenv("GORACE"))
	role := os.Getenv(roleVariable)
	if role == "" {
		os.Exit(m.Run())
	}
	if fault := os.Getenv(faultVariable); fault != "" {
		step.SetHook(func(at step.Step) {
			if at.String() == fault {
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		})
	}
	run, ok := roles[role]
	if !ok {
		fmt.Fprintf(os.Stderr, "no role %q\n", role)
		os.Exit(3)
	}
	run()
	os.Exit(0)
}

// report tells the test what has happened in this process.
func report(event string, details ...any) {
	text := strings.TrimSuffix(fmt.Sprintln(details...), "\n")
	fmt.Fprintf(os.Stdout, "report %d %s %s\n", os.Getpid(), event, strconv.Quote(text))
}

// must is for roles: it panics, which ends the process with status 2.
func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// A message is what a process has reported.
type message struct {
	pid         int
	event, text string
}

// A service is all the processes that descend from one test, and share its pipe.
type service struct {
	t        *testing.T
	output   *os.File // the write end of the pipe, the processes' standard output
	messages chan message
	ended    chan struct{} // closed once no process has the pipe open

	mu   sync.Mutex
	pids map[int]string // with their start times
}

// newService kills what is left of its processes at the end of the test.
func newService(t *testing.T) *service {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s := &service{
		t:        t,
		output:   write,
		messages: make(chan message, 10000),
		ended:    make(chan struct{}),
		pids:     map[int]string{},
	}
	go s.listen(read)
	t.Cleanup(func() {
		write.Close()
		s.mu.Lock()
		for pid, started := range s.pids {
			if startTime(pid) == started {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		s.mu.Unlock()
		select {
		case <-s.ended:
		case <-time.After(patience):
			t.Error("processes of this test are still running")
		}
	})
	return s
}

// startTime tells a process from an unrelated one that is given its PID later. It
// is empty where it is not known, and for a process that has ended.
func startTime(pid int) string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	// The second field is a name in parentheses, which may contain anything; the
	// 22nd is the time (proc_pid_stat(5)).
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}

func (s *service) listen(read *os.File) {
	defer read.Close()
	defer close(s.ended)
	lines := bufio.NewScanner(read)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		fields := strings.SplitN(lines.Text(), " ", 4)
		if len(fields) != 4 || fields[0] != "report" {
			if line := lines.Text(); line != "PASS" && !strings.HasPrefix(line, "coverage:") {
				fmt.Fprintln(os.Stderr, line)
			}
			continue
		}
		pid, _ := strconv.Atoi(fields[1])
		text, _ := strconv.Unquote(fields[3])
		s.watch(pid)
		s.messages <- message{pid, fields[2], text}
	}
}

// watch remembers a process that is to be killed at the end of the test.
func (s *service) watch(pid int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.pids[pid]; !ok {
		s.pids[pid] = startTime(pid)
	}
}

// await returns the next message of this event. Others before it are dropped.
func (s *service) await(event string) message {
	s.t.Helper()
	timeout := time.After(patience)
	var dropped []message
	for {
		select {
		case m := <-s.messages:
			if m.event == event {
				return m
			}
			dropped = append(dropped, m)
		case <-timeout:
			s.t.Fatalf("waited for %q, got %v", event, dropped)
		}
	}
}

// awaitEnd waits until all processes have ended. The test must not start more.
func (s *service) awaitEnd() {
	s.t.Helper()
	s.output.Close()
	select {
	case <-s.ended:
	case <-time.After(patience):
		s.t.Fatal("processes of this test are still running")
	}
}

// startService starts the first generation in a role. env adds to its environment,
// and to that of the generations after it.
func startService(t *testing.T, role string, env ...string) (*service, *exec.Cmd) {
	t.Helper()
	s := newService(t)
	cmd := s.command(role, env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.watch(cmd.Process.Pid)
	reaped := make(chan struct{})
	go func() {
		cmd.Wait()
		close(reaped)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-reaped
	})
	return s, cmd
}

func (s *service) command(role string, env ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), roleVariable+"="+role), env...)
	cmd.Stdout = s.output
	cmd.Stderr = os.Stderr
	return cmd
}

// newParent makes the test itself the first generation. Its children get the role
// and env, which may be changed between upgrades.
func newParent(t *testing.T, opts tableflip.Options, role string, env ...string) (*tableflip.Upgrader, *service) {
	t.Helper()
	s := newService(t)
	customize := opts.Command
	opts.Command = func(cmd *exec.Cmd) {
		cmd.Args = os.Args[:1]
		cmd.Env = append(append(os.Environ(), roleVariable+"="+role), env...)
		cmd.Stdout = s.output
		if customize != nil {
			customize(cmd)
		}
	}
	upg, err := tableflip.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(upg.Stop)
	return upg, s
}

// ready is for tests that are the parent themselves.
func ready(t *testing.T, upg *tableflip.Upgrader) {
	t.Helper()
	if err := upg.Ready(); err != nil {
		t.Fatal(err)
	}
}
