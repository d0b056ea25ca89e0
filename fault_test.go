//go:build unix

package tableflip_test

import (
	"errors"
	"maps"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/step"
)

// What happens to the service when one of the two processes of an upgrade dies,
// hangs or gives up, at any step of the handover.

func init() {
	sayReady := func(message string) func(*wire, *tableflip.Upgrader) {
		return func(w *wire, _ *tableflip.Upgrader) {
			must(syscall.Write(3, []byte(message)))
			w.hang()
		}
	}
	maps.Copy(mishaps, map[string]func(*wire, *tableflip.Upgrader){
		"exit 0": func(*wire, *tableflip.Upgrader) { os.Exit(0) },
		"exit 7": func(*wire, *tableflip.Upgrader) { os.Exit(7) },
		"hang":   func(w *wire, _ *tableflip.Upgrader) { w.hang() },
		"SIGSTOP": func(w *wire, _ *tableflip.Upgrader) {
			w.send(notice{Step: "hanging"})
			syscall.Kill(os.Getpid(), syscall.SIGSTOP)
			select {} // until it takes effect
		},
		"Stop and exit": func(_ *wire, upg *tableflip.Upgrader) {
			upg.Stop()
			os.Exit(7)
		},
		"Stop and linger": func(w *wire, upg *tableflip.Upgrader) {
			upg.Stop()
			w.hang()
		},
		"Stop after saying ready": func(w *wire, upg *tableflip.Upgrader) {
			said := make(chan struct{})
			step.SetHook(func(s step.Step) {
				if s == step.ReadySaid {
					close(said)
				}
			})
			go func() {
				<-said
				upg.Stop()
			}()
			w.tell("refused", upg.Ready())
			w.hang()
		},
		"hang up": func(w *wire, _ *tableflip.Upgrader) {
			syscall.Close(3)
			w.hang()
		},
		"say nonsense":        sayReady("ready!\n"),
		"say an empty line":   sayReady("\n"),
		"say a negative PID":  sayReady("-1\n"),
		"say no end of zeros": sayReady(strings.Repeat("0", 1000)),
		"say half a word and hang up": func(w *wire, _ *tableflip.Upgrader) {
			must(syscall.Write(3, []byte("re")))
			syscall.Close(3)
			w.hang()
		},
		"no space": func(*wire, *tableflip.Upgrader) { fillDisk() },
		"no space at first": func(w *wire, upg *tableflip.Upgrader) {
			fillDisk()
			w.tell("no space", upg.Ready())
			w.step("before trying again")
			if err := limit(syscall.RLIMIT_FSIZE, -1); err != nil {
				panic(err)
			}
		},
	})
}

// fillDisk makes every write to a file fail, as on a full disk.
func fillDisk() {
	signal.Ignore(syscall.SIGXFSZ)
	if err := limit(syscall.RLIMIT_FSIZE, 0); err != nil {
		panic(err)
	}
}

// TestChildFails checks that a child that does not get to the commit leaves its
// parent as it was.
func TestChildFails(t *testing.T) {
	t.Parallel()
	const killed, late = "signal: killed", "deadline"
	tests := []struct {
		name    string
		fault   string // the step at which the child is killed
		mishap  string // or what else happens to it
		refusal error  // the cause of what its Ready returns, if it does
		lingers bool   // it does not end by itself
		timeout time.Duration
		cause   string // of what Upgrade returns
		text    string // in that error
	}{
		{name: "killed before New", fault: "before New", cause: killed},
		{name: "killed after New", fault: "new", cause: killed},
		{name: "killed after claiming", fault: "claimed", cause: killed},
		{name: "killed while it writes the PID file", fault: "pid file written", cause: killed},
		{name: "killed after it said ready", fault: "ready said", text: "the new process"},

		{name: "exits", mishap: "exit 0", text: "exit status 0"},
		{name: "fails", mishap: "exit 7", cause: "exit status 7"},
		{name: "stops and exits", mishap: "Stop and exit", cause: "exit status 7"},
		{name: "stops and lingers", mishap: "Stop and linger", lingers: true, text: "gave up"},
		{name: "stops after it said ready", mishap: "Stop after saying ready", lingers: true, text: "was stopped"},
		{name: "closes its ready pipe", mishap: "hang up", lingers: true, text: "gave up"},
		{name: "says nonsense", mishap: "say nonsense", lingers: true, text: `"ready!\n"`},
		{name: "says an empty line", mishap: "say an empty line", lingers: true, text: `"\n"`},
		{name: "says a negative PID", mishap: "say a negative PID", lingers: true, text: `"-1\n"`},
		{name: "says no end of zeros", mishap: "say no end of zeros", lingers: true, text: strings.Repeat("0", 32)},
		{name: "says half a word", mishap: "say half a word and hang up", lingers: true, text: `"re"`},
		{name: "hangs", mishap: "hang", lingers: true, timeout: 2 * time.Second, cause: late},
		{name: "is suspended", mishap: "SIGSTOP", lingers: true, timeout: 2 * time.Second, cause: late},
		{name: "has no space for the PID file", mishap: "no space", refusal: syscall.EFBIG, cause: "exit status 2"},
		{name: "misses the PID file's directory", mishap: "missing directory", refusal: syscall.ENOENT, cause: "exit status 2"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c, parent, _ := startChain(t, timeoutVariable+"="+test.timeout.String())
			before := openFiles(t, parent.pid)

			parent.order("upgrade", pauseVariable+"=started", faultVariable+"="+test.fault, mishapVariable+"="+test.mishap)
			parent.await("child started")
			suspend(t, parent.pid)
			child := c.next()
			child.await("started")
			requests := c.send()
			child.order("resume")
			if test.refusal != nil {
				if n := child.await("refused"); n.Cause != test.refusal.Error() || !strings.Contains(n.Text, "PID file") {
					t.Errorf("Ready returned %q, caused by %q; want %q", n.Text, n.Cause, test.refusal)
				}
			}
			if test.lingers {
				child.await("hanging")
			} else {
				child.awaitEnd()
			}
			resume(t, parent.pid)

			n := parent.await("upgraded")
			if !strings.HasPrefix(n.Text, "tableflip: ") || !strings.Contains(n.Text, test.text) || test.cause != "" && n.Cause != test.cause {
				t.Errorf("Upgrade returned %q, caused by %q; want %q, caused by %q", n.Text, n.Cause, test.text, test.cause)
			}
			if err := syscall.Kill(child.pid, 0); err != syscall.ESRCH {
				t.Errorf("the child has not been reaped: %v", err)
			}
			expectNoChildren(t, parent.pid)
			c.expectAnswers(requests, parent.pid)
			c.expectCharge(parent.pid)
			if after := openFiles(t, parent.pid); !maps.Equal(after, before) {
				t.Errorf("the descriptors were %v, and are %v", before, after)
			}

			next := c.upgrade(parent)
			c.expectCharge(next.pid)
			c.expectStop(next)
		})
	}
}

// TestParentIsKilled checks that the child carries the service on.
func TestParentIsKilled(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		step  string // of the parent, at which it is killed
		pause string // where the child waits meanwhile
	}{
		{name: "child just started", step: "child started", pause: "started"},
		{name: "child initialises", pause: "new"},
		{name: "child has claimed", pause: "claimed"},
		{name: "ready received", step: "ready received", pause: "ready"},
		{name: "before commit", step: "before commit", pause: "ready"},
		{name: "after commit", step: "after commit", pause: "ready"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c, parent, reaped := startChain(t, faultVariable+"="+test.step)
			before := openFiles(t, parent.pid)

			parent.order("upgrade", pauseVariable+"="+test.pause)
			child := c.next()
			child.await(test.pause)
			if test.step == "" {
				syscall.Kill(parent.pid, syscall.SIGKILL)
			}
			<-reaped
			requests := c.send()
			child.order("resume")

			child.await("alone")
			c.expectAnswers(requests, child.pid)
			c.expectCharge(child.pid)
			expectNoChildren(t, child.pid)
			if before, after := kindsOf(before), kindsOf(openFiles(t, child.pid)); !maps.Equal(after, before) {
				t.Errorf("the parent had the descriptors %v, and the child has %v", before, after)
			}

			next := c.upgrade(child)
			c.expectCharge(next.pid)
			c.expectStop(next)
		})
	}
}

// TestServiceIsGone checks what is left when the process in charge is killed and
// there is no other: what its death itself leaves, and no more. It is for a
// supervisor to start the service again.
func TestServiceIsGone(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name       string
		parentStep string
		childStep  string
	}{
		{name: "parent killed before starting a child", parentStep: "starting"},
		// The commit has been written, and cannot be taken back: the parent exits.
		{name: "child killed after commit", childStep: "verdict received"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c, parent, reaped := startChain(t, faultVariable+"="+test.parentStep)
			parent.order("upgrade", faultVariable+"="+test.childStep)
			last := parent
			if test.childStep != "" {
				last = c.next()
				if n := parent.await("upgraded"); n.Text != "" {
					t.Errorf("Upgrade returned %q", n.Text)
				}
				last.awaitEnd()
			}
			<-reaped

			for network, addr := range map[string]string{"tcp": c.tcp, "unix": filepath.Join(c.dir, "socket")} {
				if conn, err := net.Dial(network, addr); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("dialling %s: %v, %v; want it refused", network, conn, err)
				}
			}
			c.expectPIDFile(last.pid)
			c.expectFiles("pid", "socket")

			c.removeSocket()
			again, _ := c.start()
			again.await("alone")
			c.expectCharge(again.pid)
			next := c.upgrade(again)
			c.expectCharge(next.pid)
			c.expectStop(next)
		})
	}
}

// TestFirstGenerationIsKilled checks that the temporary file, which a process
// that is killed while it writes the PID file leaves, goes at the next start.
func TestFirstGenerationIsKilled(t *testing.T) {
	t.Parallel()
	c := newChain(t)
	first, reaped := c.start(faultVariable + "=pid file written")
	first.awaitEnd()
	<-reaped
	c.expectFiles("pid.tmp", "socket")
	c.removeSocket()
	again, _ := c.start()
	again.await("alone")
	c.expectCharge(again.pid)
	c.expectStop(again)
}

// TestParentIsSuspended checks that a child waits for a parent that sleeps
// between ready and the verdict.
func TestParentIsSuspended(t *testing.T) {
	t.Parallel()
	tests := []struct {
		step        string
		childServes bool
	}{
		{"ready received", false},
		{"before commit", false},
		{"after commit", true},
	}
	for _, test := range tests {
		t.Run(test.step, func(t *testing.T) {
			t.Parallel()
			c, parent, _ := startChain(t, pauseVariable+"="+test.step)
			parent.order("upgrade")
			child := c.next()
			parent.await(test.step)
			c.expectPIDFile(child.pid) // systemd reads it as soon as the parent exits
			suspend(t, parent.pid)
			requests := c.send()
			if test.childServes {
				c.expectAnswers(requests, child.pid)
				resume(t, parent.pid)
			} else {
				resume(t, parent.pid)
				c.expectAnswers(requests, parent.pid)
			}
			parent.order("resume")

			if n := parent.await("upgraded"); n.Text != "" {
				t.Errorf("Upgrade returned %q", n.Text)
			}
			child.await("alone")
			c.expectCharge(child.pid)
			next := c.upgrade(child)
			c.expectCharge(next.pid)
			c.expectStop(next)
		})
	}
}

// TestReadyAfterFullDisk checks that a Ready that could not write the PID file
// leaves no other file, and can be tried again.
func TestReadyAfterFullDisk(t *testing.T) {
	t.Parallel()
	expectTrouble := func(g *generation) {
		t.Helper()
		if n := g.await("no space"); n.Cause != syscall.EFBIG.Error() || !strings.Contains(n.Text, "PID file") {
			t.Errorf("Ready returned %q, caused by %q; want %q", n.Text, n.Cause, syscall.EFBIG)
		}
		g.await("before trying again")
	}
	env := []string{mishapVariable + "=no space at first", pauseVariable + "=before trying again"}
	c := newChain(t)
	parent, _ := c.start(env...)
	expectTrouble(parent)
	c.expectFiles("socket")
	parent.order("resume")
	parent.await("alone")
	c.expectCharge(parent.pid)

	parent.order("upgrade", env...)
	child := c.next()
	expectTrouble(child)
	c.expectCharge(parent.pid)
	child.order("resume")
	child.await("alone")
	parent.awaitEnd()
	c.expectCharge(child.pid)
	c.expectStop(child)
}

// removeSocket removes the Unix socket's file, which after a crash is in the way
// of a new one.
func (c *chain) removeSocket() {
	c.t.Helper()
	if err := os.Remove(filepath.Join(c.dir, "socket")); err != nil {
		c.t.Error(err)
	}
}

// awaitStop waits until a child of this process has stopped. The system's own test
// file sets it; without it a request that is meant to meet nobody may meet somebody.
var awaitStop = func(t *testing.T, pid int) {}

func suspend(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	awaitStop(t, pid)
}

func resume(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
}

// expectNoChildren checks that a process has neither children nor zombies, where
// there is a /proc.
func expectNoChildren(t *testing.T, pid int) {
	t.Helper()
	if runtime.GOOS != "linux" {
		return
	}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// proc_pid_stat(5): PID (NAME) STATE PARENT …, and NAME may be anything.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if fields[1] == strconv.Itoa(pid) {
			t.Errorf("%d has a child: %s", pid, stat)
		}
	}
}
