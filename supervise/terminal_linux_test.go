package supervise_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	ctrlC = "\x03"
	ctrlZ = "\x1a"
)

// A console is the other end of a terminal.
type console struct {
	*bed
	master *os.File
}

// startConsole starts cmd as the leader of a session that has a terminal of its own.
func startConsole(t *testing.T, cmd *exec.Cmd) *console {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs pseudo-terminals: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	c := &console{newBed(t), master}
	c.ioctl(func(fd int) (int, error) { return 0, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0) })
	number := c.ioctl(func(fd int) (int, error) { return unix.IoctlGetInt(fd, unix.TIOCGPTN) })
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("needs pseudo-terminals: %v", err)
	}
	defer slave.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	c.run(cmd)
	go c.log.read(master)
	return c
}

// ioctl does not use Fd, which would have reads block for ever.
func (c *console) ioctl(call func(fd int) (int, error)) (result int) {
	c.t.Helper()
	raw, err := c.master.SyscallConn()
	if err == nil {
		controlErr := raw.Control(func(fd uintptr) { result, err = call(int(fd)) })
		err = errors.Join(err, controlErr)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return result
}

func (c *console) foreground() int {
	c.t.Helper()
	return c.ioctl(func(fd int) (int, error) { return unix.IoctlGetInt(fd, unix.TIOCGPGRP) })
}

// press types.
func (c *console) press(keys string) {
	c.t.Helper()
	if _, err := c.master.WriteString(keys); err != nil {
		c.t.Fatal(err)
	}
}

// reads checks that p reads from the terminal.
func (c *console) reads(p *puppet) {
	c.t.Helper()
	p.tell("read", "")
	c.press("text\n")
	if got := p.done(); got != "text\n" {
		c.t.Fatalf("read %q", got)
	}
}

// As a container's process 1 with a terminal: nobody can continue what Ctrl-Z stops.
func TestTerminal(t *testing.T) {
	t.Parallel()
	c := startConsole(t, exec.Command(os.Args[0], superviseArguments(nil, []string{"puppet"})...))
	first := c.next()
	c.press(ctrlC)
	first.gets("SIGINT")
	c.press(ctrlZ)
	first.gets("SIGCONT")
	c.reads(first)
	first.getsNoMore()

	second := first.upgrade(c.bed)
	c.reads(second)
	c.press(ctrlC)
	second.gets("SIGINT")
	first.gets("SIGINT") // it is in the same group
	first.getsNoMore()
	first.tell("exit", "0")
	first.ends()
	c.press(ctrlC)
	second.gets("SIGINT")
	c.press(ctrlZ)
	second.gets("SIGCONT")
	c.signal(syscall.SIGINT)
	second.gets("SIGINT")
	c.reads(second)
	second.getsNoMore()
	second.tell("exit", "4")
	c.bed.ends(4)
}

// A generation that calls Self is in a group of its own.
func TestTerminalOfSelf(t *testing.T) {
	t.Parallel()
	c := startConsole(t, exec.Command(os.Args[0], "self"))
	first := c.next()
	c.press(ctrlC)
	first.gets("SIGINT")
	second := first.upgrade(c.bed)
	third := second.spawn(c.bed) // which is not in charge
	c.press(ctrlC)
	second.gets("SIGINT")
	c.reads(second)
	third.getsNoMore()
	second.getsNoMore()
	first.getsNoMore()
	// The supervisor leaves the terminal as it found it.
	first.tell("exit", "0")
	first.ends()
	third.tell("exit", "0")
	third.ends()
	second.tell("exit", "0")
	c.bed.ends(0)
}

// startShell starts a supervisor from a shell with job control.
func startShell(t *testing.T, suffix string) *console {
	t.Helper()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("needs bash")
	}
	cmd := exec.Command(bash, "--norc", "--noprofile", "--noediting", "-i")
	c := startConsole(t, cmd)
	c.press(strings.Join(append([]string{os.Args[0]}, superviseArguments(nil, []string{"puppet"})...), " ") + suffix + "\n")
	return c
}

// supervisorOf finds the supervisor from the shell's point of view.
func (c *console) supervisorOf(p *puppet) { c.pid = p.parent }

// suspends presses Ctrl-Z and waits for the shell's prompt.
func (c *console) suspends() {
	c.t.Helper()
	c.press(ctrlZ)
	c.isStopped()
	c.press("echo prom''pt\n")
	c.log.await("prompt")
}

func TestShellJob(t *testing.T) {
	t.Parallel()
	c := startShell(t, "")
	first := c.next()
	c.supervisorOf(first)
	for _, p := range []*puppet{first, nil} {
		if p == nil {
			p = first.upgrade(c.bed)
			first.tell("exit", "0")
			first.ends()
		}
		c.press(ctrlC)
		p.gets("SIGINT")
		c.suspends()
		c.press("fg\n")
		p.gets("SIGCONT")
		c.reads(p)
		c.press(ctrlC)
		p.gets("SIGINT")
		c.suspends()
		c.press("bg\n")
		p.gets("SIGCONT")
		c.press("fg\n") // which tells the job nothing if it runs
		until(t, "the shell has given it the terminal", func() bool { return c.foreground() == c.pid })
		c.reads(p)
		c.press(ctrlC)
		p.getsBoth("SIGCONT", "SIGINT") // continued when it tried to read
		p.getsNoMore()
		if p != first {
			p.tell("exit", "5")
		}
	}
	c.press("echo status $?\n")
	c.log.await("status 5")
}

func TestShellJobInTheBackground(t *testing.T) {
	t.Parallel()
	c := startShell(t, "")
	first := c.next()
	c.supervisorOf(first)
	c.suspends()
	c.press("bg\n")
	first.gets("SIGCONT")
	first.upgrade(c.bed)
	if group := c.foreground(); group != c.supervisor.Process.Pid {
		t.Errorf("group %d has the terminal, not the shell", group)
	}
}

// Two processes of the service are stopped one after the other.
func TestShellJobStopsOnce(t *testing.T) {
	t.Parallel()
	c := startShell(t, "")
	first := c.next()
	c.supervisorOf(first)
	second, helper := first.spawn(c.bed), first.spawn(c.bed)
	first.do("notify", fmt.Sprintf("MAINPID=%d", second.pid))
	first.tell("exit", "0")
	first.ends()
	syscall.Kill(second.pid, syscall.SIGSTOP)
	c.isStopped()
	syscall.Kill(helper.pid, syscall.SIGSTOP)
	c.press("fg\n")
	second.gets("SIGCONT")
	helper.gets("SIGCONT")
	c.reads(second)
	c.signal(syscall.SIGUSR1)
	second.gets("SIGUSR1") // the supervisor goes on, too
}

// A script goes on with the terminal that it had.
func TestScript(t *testing.T) {
	t.Parallel()
	broken := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(broken, []byte("#!/nowhere/interpreter\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	c := startConsole(t, exec.Command("/bin/sh", "-c", `"$@"; read line; echo "and then $line"; `+os.Args[0]+` supervise -- `+broken+`; read line; echo "at last $line"`,
		"sh", os.Args[0], "supervise", "--", os.Args[0], "puppet"))
	main := c.next()
	main.tell("exit", "0")
	main.ends()
	c.press("one\n")
	c.log.await("and then one")
	c.log.await("run:", "can't start")
	c.press("two\n")
	c.log.await("at last two")
}

// The service's input is not the terminal: Ctrl-C goes to the supervisor, which
// passes it on.
func TestShellJobWithoutInput(t *testing.T) {
	t.Parallel()
	c := startShell(t, " </dev/null")
	first := c.next()
	c.press(ctrlC)
	first.gets("SIGINT")
	second := first.upgrade(c.bed)
	c.press(ctrlC)
	second.gets("SIGINT")
	second.getsNoMore()
	first.getsNoMore()
}
