//go:build unix

package proctest

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"

	"example.com/tableflip/internal/step"
)

// A Service is all the processes that descend from one test, and share its pipe. Its
// methods are for the goroutine of the test.
type Service struct {
	// Output is the write end of the pipe, the processes' standard output.
	Output *os.File

	t       *testing.T
	reports mailbox       // ends once no process has the pipe open
	joined  chan *Process // by their wires
	wire    net.Listener
	hearing sync.WaitGroup

	pids PIDs // to be killed at the end of the test

	mu    sync.Mutex
	hooks map[hook]int // how many processes are still to come there
}

// A hook is what a process does at a step: it has died or paused.
type hook struct{ did, at string }

// NewService makes room for processes. At the end of the test it kills what is left of
// them, and fails the test if none came to a step of DieAt or PauseAt.
func NewService(t *testing.T) *Service {
	t.Helper()
	read, write, err := os.Pipe()
	OK(t, err)
	s := &Service{
		Output: write,
		t:      t,
		joined: make(chan *Process, 1000),
		hooks:  map[hook]int{},
	}
	go s.listen(read)
	t.Cleanup(s.cleanUp)
	return s
}

func (s *Service) cleanUp() {
	s.Output.Close()
	s.pids.Kill()
	if !s.reports.AwaitEnd() {
		s.t.Error("processes of this test are still running")
		return
	}
	Within(s.t, "the ends of all wires", Waited(&s.hearing))
	if s.t.Failed() || s.t.Skipped() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for h, left := range s.hooks {
		if left > 0 {
			s.t.Errorf("no process has %s at the step %q", h.did, h.at)
		}
	}
}

func (s *Service) listen(read *os.File) {
	defer s.reports.End()
	defer read.Close()
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
		s.Watch(pid)
		if fields[2] == died {
			s.did(hook{died, text})
			continue
		}
		s.reports.Add(Message{PID: pid, Event: fields[2], Text: text})
	}
}

// Watch remembers a process that is to be killed at the end of the test.
func (s *Service) Watch(pid int) { s.pids.Add(pid) }

// DieAt returns the variable for a process that is to kill itself at a step. Its
// children do not inherit it. The zero Step is none.
func (s *Service) DieAt(at step.Step) string { return dieVariable + "=" + s.hook(died, at) }

// PauseAt returns the variable for a process with a Wire that is to wait for Resume when it
// comes to a step for the first time. Otherwise it is like DieAt.
func (s *Service) PauseAt(at step.Step) string { return pauseVariable + "=" + s.hook(paused, at) }

func (s *Service) hook(did string, at step.Step) (name string) {
	if at == (step.Step{}) {
		return ""
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hooks[hook{did, at.String()}]++
	return at.String()
}

func (s *Service) did(h hook) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hooks[h]--
}

// Prepare has cmd start a process of the service in a role. env adds to its
// environment, and to that of the generations after it.
func (s *Service) Prepare(cmd *exec.Cmd, role string, env ...string) {
	cmd.Args = []string{os.Args[0]}
	cmd.Env = append(append(os.Environ(), Environment(role)), env...)
	cmd.Stdout = s.Output
}

// Command returns a command for a process of the service in a role.
func (s *Service) Command(role string, env ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	s.Prepare(cmd, role, env...)
	cmd.Stderr = os.Stderr
	return cmd
}

// Start starts cmd. The channel is closed when the process has been waited for, after
// which cmd.ProcessState is set.
func (s *Service) Start(cmd *exec.Cmd) (reaped <-chan struct{}) {
	s.t.Helper()
	OK(s.t, cmd.Start())
	s.Watch(cmd.Process.Pid)
	waited := make(chan struct{})
	go func() {
		cmd.Wait()
		close(waited)
	}()
	s.t.Cleanup(func() {
		cmd.Process.Kill()
		<-waited
	})
	return waited
}

// Start starts the first generation of a service in a role.
func Start(t *testing.T, role string, env ...string) (*Service, *exec.Cmd) {
	t.Helper()
	s := NewService(t)
	cmd := s.Command(role, env...)
	s.Start(cmd)
	return s, cmd
}

// Await returns the next report of this event. Reports before it are dropped.
func (s *Service) Await(event string) Message {
	s.t.Helper()
	m, dropped, ok := s.reports.await(event, true)
	if !ok {
		s.t.Fatalf("waited for %q, got %v", event, dropped)
	}
	return m
}

// AwaitEnd waits until all processes have ended. The test must not start more.
func (s *Service) AwaitEnd() {
	s.t.Helper()
	s.Output.Close()
	if !s.reports.AwaitEnd() {
		s.t.Fatal("processes of this test are still running")
	}
}

// A Message is a report of a process.
type Message struct {
	PID         int
	Event, Text string
	Cause       string // of an error, see CauseOf
}

// A mailbox holds messages until they are asked for.
type mailbox struct{ Journal[Message] }

// await returns the first message of an event, and removes it and, if drop, those
// before it. If there is none, even at the end, ok is false.
func (b *mailbox) await(event string, drop bool) (found Message, before []Message, ok bool) {
	b.until(func() bool {
		for i, m := range b.items {
			if m.Event != event {
				continue
			}
			found, before, ok = m, b.items[:i], true
			if drop {
				b.items = b.items[i+1:]
			} else {
				b.items = append(b.items[:i:i], b.items[i+1:]...)
			}
			return true
		}
		before = b.items
		return b.ended
	})
	return found, before, ok
}
