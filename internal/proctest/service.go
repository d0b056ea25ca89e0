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
	"syscall"
	"testing"
	"time"

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

	mu    sync.Mutex
	pids  map[int]string // with their start times
	hooks map[hook]int   // how many processes are still to come there
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
		pids:   map[int]string{},
		hooks:  map[hook]int{},
	}
	go s.listen(read)
	t.Cleanup(s.cleanUp)
	return s
}

func (s *Service) cleanUp() {
	s.Output.Close()
	s.mu.Lock()
	for pid, started := range s.pids {
		if startTime(pid) == started {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	s.mu.Unlock()
	if !s.reports.awaitEnd() {
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
	defer s.reports.end()
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
		s.reports.put(Message{PID: pid, Event: fields[2], Text: text})
	}
}

// Watch remembers a process that is to be killed at the end of the test.
func (s *Service) Watch(pid int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.pids[pid]; !ok {
		s.pids[pid] = startTime(pid)
	}
}

// DieAt returns the variable for a process that is to kill itself at a step. Its
// children do not inherit it. The zero Step is none.
func (s *Service) DieAt(at step.Step) string { return dieVariable + "=" + s.hook(died, at) }

// PauseAt is DieAt for a process that has a Wire, and is to wait for Resume when it
// comes to the step first.
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
	cmd.Args = os.Args[:1]
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

// Await returns the next report of this event. Others before it are dropped.
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
	if !s.reports.awaitEnd() {
		s.t.Fatal("processes of this test are still running")
	}
}

// A Message is what a process has reported.
type Message struct {
	PID         int
	Event, Text string
	Cause       string // of an error, see CauseOf
}

// A mailbox holds messages until they are asked for.
type mailbox struct {
	mu       sync.Mutex
	messages []Message
	ended    bool
	changed  chan struct{} // closed at the next change, nil if nobody waits
}

func (b *mailbox) put(m Message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.messages = append(b.messages, m)
	b.changeLocked()
}

func (b *mailbox) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
	b.changeLocked()
}

func (b *mailbox) changeLocked() {
	if b.changed != nil {
		close(b.changed)
		b.changed = nil
	}
}

// await returns the first message of an event, and removes it and, if drop, those
// before it. If there is none, even at the end, ok is false.
func (b *mailbox) await(event string, drop bool) (found Message, before []Message, ok bool) {
	b.until(func() bool {
		for i, m := range b.messages {
			if m.Event != event {
				continue
			}
			found, before, ok = m, b.messages[:i], true
			if drop {
				b.messages = b.messages[i+1:]
			} else {
				b.messages = append(b.messages[:i:i], b.messages[i+1:]...)
			}
			return true
		}
		before = b.messages
		return b.ended
	})
	return found, before, ok
}

// awaitEnd reports whether there will be no more messages.
func (b *mailbox) awaitEnd() bool { return b.until(func() bool { return b.ended }) }

// until waits for done, which is called with the lock held, and reports whether it
// came true.
func (b *mailbox) until(done func() bool) bool {
	timeout := time.After(Patience)
	for {
		b.mu.Lock()
		if done() {
			b.mu.Unlock()
			return true
		}
		if b.changed == nil {
			b.changed = make(chan struct{})
		}
		changed := b.changed
		b.mu.Unlock()
		select {
		case <-changed:
		case <-timeout:
			return false
		}
	}
}
