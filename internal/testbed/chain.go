//go:build linux

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/testbed/proc"
	"example.com/tableflip/internal/testbed/wire"
)

// chain owns the server processes: the first generation, which it starts, and its
// descendants. It knows what they report, and what the process table says. This process
// is a subreaper (PR_SET_CHILD_SUBREAPER in prctl(2)), so that orphans become its
// children, and it learns how they have ended.
//
// No server survives this process: the servers exit at the end of their standard input,
// and this process holds the only other end.
type chain struct {
	path string   // of the binary
	args []string // of each server
	log  *os.File // standard error of all servers

	stdin, lifeline *os.File      // read and write end
	stdout          *os.File      // write end, for restarts
	closed          chan struct{} // when no process can report any more
	ended           chan os.Signal

	mu        sync.Mutex
	group     int           // process group of all servers
	changed   chan struct{} // closed, and replaced, when what follows changes
	processes map[int]*process
	inCharge  int          // PID, or 0
	served    map[int]bool // versions that were ever in charge, or on trial
	injected  wire.Event   // the last fault that a process reported
}

type process struct {
	entry   proc.Process
	version int
	isFirst bool              // generation
	steps   map[string]string // reported steps, with their error
	ended   time.Time         // when it was waited for by this process
	status  syscall.WaitStatus
}

func (p *process) reported(step string) bool {
	_, ok := p.steps[step]
	return ok
}

// lives asks the process table, because another process may have waited for p.
func (p *process) lives() bool { return p.ended.IsZero() && p.entry.Lives() }

func newChain(path string, args []string, log *os.File) (*chain, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, err
	}
	c := &chain{
		path: path, args: args, log: log,
		closed:    make(chan struct{}),
		ended:     make(chan os.Signal, 1),
		changed:   make(chan struct{}),
		processes: make(map[int]*process),
		served:    make(map[int]bool),
	}
	var err error
	if c.stdin, c.lifeline, err = os.Pipe(); err != nil {
		return nil, err
	}
	events, stdout, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	c.stdout = stdout
	signal.Notify(c.ended, syscall.SIGCHLD)
	go c.listen(events)
	go c.reap()
	return c, nil
}

// start starts a first generation, in a process group of its own, which all later ones
// are in, and waits until it is ready. Nothing may be left of those before.
func (c *chain) start() error {
	cmd := exec.Command(c.path, c.args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.stdin, c.stdout, c.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.mu.Lock()
	err := cmd.Start()
	var p *process
	if err == nil {
		c.group = cmd.Process.Pid
		p = c.process(c.group)
		p.isFirst = true
	}
	c.mu.Unlock()
	if err != nil {
		return err
	}
	pid := cmd.Process.Pid
	cmd.Process.Release() // reap waits for it
	ok := c.await(startLimit, func() bool { return p.reported(wire.Ready) || !p.lives() })
	c.mu.Lock()
	defer c.mu.Unlock()
	if !ok || !p.lives() {
		return fmt.Errorf("the first generation, PID %d, did not become ready", pid)
	}
	return nil
}

const startLimit = 20 * time.Second

// listen notes what the servers report.
func (c *chain) listen(events *os.File) {
	defer close(c.closed)
	defer events.Close()
	lines := bufio.NewScanner(events)
	for lines.Scan() {
		var e wire.Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			fmt.Fprintf(c.log, "testbed: bad event %q\n", lines.Text())
			continue
		}
		c.mu.Lock()
		p := c.process(e.PID)
		p.version = e.Version
		p.steps[e.Step] = e.Error
		switch e.Step {
		case wire.Injecting:
			c.injected = e
		case wire.OnTrial:
			c.served[e.Version] = true
		case wire.Ready:
			c.served[e.Version] = true
			if p.lives() {
				c.inCharge = e.PID
			}
		}
		c.notify()
		c.mu.Unlock()
	}
}

// reap waits for children, which includes all orphans.
func (c *chain) reap() {
	for range c.ended {
		for {
			var status syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
			if err == syscall.EINTR {
				continue
			}
			if pid <= 0 {
				break
			}
			c.mu.Lock()
			p := c.process(pid)
			p.ended, p.status = time.Now(), status
			if c.inCharge == pid {
				c.inCharge = 0
			}
			c.notify()
			c.mu.Unlock()
		}
	}
}

func (c *chain) process(pid int) *process {
	p := c.processes[pid]
	if p == nil {
		p = &process{steps: make(map[string]string)}
		p.entry, _ = proc.Find(pid)
		p.entry.PID = pid // also if it is gone
		c.processes[pid] = p
	}
	return p
}

// forget makes room for the next upgrade by the process pid.
func (c *chain) forget(pid int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.process(pid).steps, wire.UpgradeFailed)
	c.injected = wire.Event{}
	for other := range c.processes {
		if other != pid {
			delete(c.processes, other)
		}
	}
}

func (c *chain) notify() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// await waits until condition, which is called with the chain locked, is true,
// and reports whether it became so in time. It also polls, because no event announces a
// change of the process table.
func (c *chain) await(limit time.Duration, condition func() bool) bool {
	timeout := time.After(limit)
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for {
		c.mu.Lock()
		ok, changed := condition(), c.changed
		c.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-changed:
		case <-poll.C:
		case <-timeout:
			return false
		}
	}
}

// current returns the PID and the version of the process in charge; PID 0 if
// there is none.
func (c *chain) current() (pid, version int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.processes[c.inCharge]
	if p == nil || !p.lives() {
		return 0, 0
	}
	return c.inCharge, p.version
}

// living returns the PIDs of the processes that have reported something, and have not been
// waited for.
func (c *chain) living() (pids []int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for pid, p := range c.processes {
		if p.ended.IsZero() {
			pids = append(pids, pid)
		}
	}
	return pids
}

// stop ends all servers, first by asking, and reports whether that sufficed. It
// returns when none is left.
func (c *chain) stop(limit time.Duration) error {
	pid, _ := c.current()
	if pid != 0 {
		syscall.Kill(pid, syscall.SIGTERM)
	}
	orderly := c.await(limit, func() bool {
		p := c.processes[pid]
		return p == nil || !p.lives()
	})
	c.lifeline.Close()
	c.stdout.Close()
	defer func() {
		signal.Stop(c.ended)
		close(c.ended)
	}()
	for tries := 0; ; tries++ {
		select {
		case <-c.closed:
			if !orderly {
				return fmt.Errorf("PID %d did not exit within %v of SIGTERM", pid, limit)
			}
			return nil
		case <-time.After(3 * time.Second):
			c.kill()
		}
		if tries == 10 {
			return fmt.Errorf("some server survives")
		}
	}
}

// servers returns the processes that run, or are zombies.
func (c *chain) servers() []proc.Process { return proc.InGroup(c.group) }

// kill kills all servers.
func (c *chain) kill() {
	if len(c.servers()) > 0 {
		syscall.Kill(-c.group, syscall.SIGKILL)
	}
}
