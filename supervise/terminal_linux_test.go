package supervise_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
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
	go c.log.Read(master)
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
	proctest.OK(c.t, err)
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
	p.Order("read")
	c.press("text\n")
	if got := p.Take("done").Text; got != "text\n" {
		c.t.Fatalf("read %q", got)
	}
}

// As a container's process 1 with a terminal: nobody can continue what Ctrl-Z stops.
func TestTerminal(t *testing.T) {
	t.Parallel()
	c := startConsole(t, supervisor(nil, "puppet"))
	first := c.next()
	c.press(ctrlC)
	first.wantSignals("SIGINT")
	c.press(ctrlZ)
	first.wantSignals("SIGCONT")
	c.reads(first)
	first.wantNoMoreSignals()

	second := first.upgrade(c.bed)
	c.reads(second)
	c.press(ctrlC)
	second.wantSignals("SIGINT")
	first.wantSignals("SIGINT") // it is in the same group
	first.wantNoMoreSignals()
	first.Order("exit", "0")
	first.AwaitEnd()
	c.press(ctrlC)
	second.wantSignals("SIGINT")
	c.press(ctrlZ)
	second.wantSignals("SIGCONT")
	c.signal(syscall.SIGINT)
	second.wantSignals("SIGINT")
	c.reads(second)
	second.wantNoMoreSignals()
	second.Order("exit", "4")
	c.bed.wantStatus(4)
}

// What stops a process of the service without the terminal may mean that.
func TestTerminalStopped(t *testing.T) {
	t.Parallel()
	c := startConsole(t, supervisor(nil, "puppet"))
	first := c.next()
	helper := first.spawn(c.bed)
	proctest.Suspend(t, first.PID)
	helper.barrier()
	helper.wantNoMoreSignals()
	proctest.Continue(t, first.PID)
	first.wantSignals("SIGCONT")
	c.reads(first)
}

// A service that was continued as a group is not continued again when it is taken over.
func TestTerminalContinuedOnce(t *testing.T) {
	t.Parallel()
	c := startConsole(t, supervisor(nil, "puppet"))
	first := c.next()
	first.beginUpgrade()
	second := first.spawn(c.bed)
	first.Order("die")
	c.log.Await("waiting for a new main process")
	c.signal(syscall.SIGCONT)
	second.wantSignals("SIGCONT")
	second.do("notify", fmt.Sprint("MAINPID=", second.PID))
	second.barrier()
	second.wantNoMoreSignals()
}

// When the main process has ended, Ctrl-C is for the supervisor, if it was for the service.
func TestTerminalOfStray(t *testing.T) {
	t.Parallel()
	flags := []string{"-stop=1h"}
	c := startConsole(t, supervisor(flags, "puppet"))
	stray := c.next().leaveStray(c)
	if group := c.foreground(); group != c.pid {
		t.Errorf("group %d has the terminal, not the supervisor", group)
	}
	stray.Order("exit", "0")
	c.wantStatus(0)

	c = startShell(t, superviseArguments(flags, "puppet"), " &")
	stray = c.next().leaveStray(c)
	if group := c.foreground(); group != c.supervisor.Process.Pid {
		t.Errorf("group %d has the terminal, not the shell", group)
	}
	stray.Order("exit", "0")
	stray.AwaitEnd()
}

// leaveStray ends p, and returns a process that it leaves behind in its group.
func (p *puppet) leaveStray(c *console) *puppet {
	p.t.Helper()
	stray := p.spawn(c.bed)
	p.Order("exit", "0")
	c.log.Await("waiting for what is left")
	return stray
}

// A generation that calls Self is in a group of its own.
func TestTerminalOfSelf(t *testing.T) {
	t.Parallel()
	c := startConsole(t, command(proctest.Arguments("self")))
	first := c.next()
	c.press(ctrlC)
	first.wantSignals("SIGINT")
	second := first.upgrade(c.bed)
	third := second.spawn(c.bed) // which is not in charge
	c.press(ctrlC)
	second.wantSignals("SIGINT")
	c.reads(second)
	third.wantNoMoreSignals()
	second.wantNoMoreSignals()
	first.wantNoMoreSignals()
	// The supervisor leaves the terminal as it found it.
	first.Order("exit", "0")
	first.AwaitEnd()
	third.Order("exit", "0")
	third.AwaitEnd()
	second.Order("exit", "0")
	c.bed.wantStatus(0)
}

// startShell starts a command from a shell with job control.
func startShell(t *testing.T, arguments []string, suffix string) *console {
	t.Helper()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("needs bash")
	}
	cmd := exec.Command(bash, "--norc", "--noprofile", "--noediting", "-i")
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	c := startConsole(t, cmd)
	c.press(strings.Join(arguments, " ") + suffix + "\n")
	return c
}

// supervisorOf finds the supervisor from the shell's point of view.
func (c *console) supervisorOf(p *puppet) {
	c.t.Helper()
	pid, err := strconv.Atoi(p.do("parent"))
	proctest.OK(c.t, err)
	c.pid = pid
}

// suspends presses Ctrl-Z and waits for the shell's prompt.
func (c *console) suspends() {
	c.t.Helper()
	c.press(ctrlZ)
	proctest.AwaitStop(c.t, c.pid)
	c.press("echo prom''pt\n")
	c.log.Await("prompt")
}

func TestShellJob(t *testing.T) {
	t.Parallel()
	c := startShell(t, superviseArguments(nil, "puppet"), "")
	first := c.next()
	c.supervisorOf(first)
	for _, p := range []*puppet{first, nil} {
		if p == nil {
			p = first.upgrade(c.bed)
			first.Order("exit", "0")
			first.AwaitEnd()
		}
		c.press(ctrlC)
		p.wantSignals("SIGINT")
		c.suspends()
		c.press("fg\n")
		p.wantSignals("SIGCONT")
		c.reads(p)
		c.press(ctrlC)
		p.wantSignals("SIGINT")
		c.suspends()
		c.press("bg\n")
		p.wantSignals("SIGCONT")
		c.press("fg\n") // which tells the job nothing if it runs
		proctest.AwaitThat(t, "the shell has given it the terminal", func() bool { return c.foreground() == c.pid })
		c.reads(p)
		c.press(ctrlC)
		p.wantBothSignals("SIGCONT", "SIGINT") // continued when it tried to read
		p.wantNoMoreSignals()
		if p != first {
			p.Order("exit", "5")
		}
	}
	c.press("echo status $?\n")
	c.log.Await("status 5")
}

// A terminal can stop who writes to it from the background.
func TestShellJobLogs(t *testing.T) {
	t.Parallel()
	c := startShell(t, superviseArguments(nil, "puppet"), "")
	first := c.next()
	c.ioctl(func(fd int) (int, error) {
		modes, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err == nil {
			modes.Lflag |= unix.TOSTOP
			err = unix.IoctlSetTermios(fd, unix.TCSETS, modes)
		}
		return 0, err
	})
	second := first.upgrade(c.bed)
	c.log.Await("new main process", fmt.Sprint("pid=", second.PID))
	second.barrier()
}

func TestShellJobInTheBackground(t *testing.T) {
	t.Parallel()
	c := startShell(t, superviseArguments(nil, "puppet"), "")
	first := c.next()
	c.supervisorOf(first)
	c.suspends()
	c.press("bg\n")
	first.wantSignals("SIGCONT")
	first.upgrade(c.bed)
	if group := c.foreground(); group != c.supervisor.Process.Pid {
		t.Errorf("group %d has the terminal, not the shell", group)
	}
}

// A job that is started there takes the terminal only once the shell has given it to the
// supervisor.
func TestShellJobStartedInTheBackground(t *testing.T) {
	t.Parallel()
	c := startShell(t, superviseArguments(nil, "puppet"), " &")
	first := c.next()
	c.supervisorOf(first)
	if group := c.foreground(); group != c.supervisor.Process.Pid {
		t.Errorf("group %d has the terminal, not the shell", group)
	}
	c.press("fg\n")
	proctest.AwaitThat(t, "the shell has given it the terminal", func() bool { return c.foreground() == c.pid })
	second := first.upgrade(c.bed)
	group, err := unix.Getpgid(second.PID)
	proctest.OK(t, err)
	proctest.AwaitThat(t, "the supervisor has given it to the service", func() bool { return c.foreground() == group })
	c.reads(second)
}

// A service that needs the terminal stops in the background, and gets the terminal once the
// shell has given it to the supervisor.
func TestShellJobAsksForTheTerminal(t *testing.T) {
	t.Parallel()
	c := startShell(t, superviseArguments(nil, "puppet"), " &")
	first := c.next()
	c.supervisorOf(first)
	first.Order("read") // which stops a job in the background
	proctest.AwaitStop(t, c.pid)
	c.awaitStoppedJob()
	c.press("fg\n")
	first.wantSignals("SIGCONT")
	c.press("text\n")
	if got := first.Take("done").Text; got != "text\n" {
		t.Fatalf("read %q", got)
	}

	c.running(first)
	first.do("stty")
	first.wantSignals("SIGCONT")
	c.reads(first)

	c.running(first)
	proctest.Kill(t, first.PID, syscall.SIGSTOP)
	proctest.AwaitStop(t, c.pid)
	c.press("fg\n")
	first.wantSignals("SIGCONT")
	c.reads(first)
	first.wantNoMoreSignals()
}

// running has the shell give the terminal to the supervisor while the job runs, which tells
// nobody.
func (c *console) running(p *puppet) {
	c.t.Helper()
	c.suspends()
	c.press("bg\n")
	p.wantSignals("SIGCONT")
	c.press("fg\n")
	proctest.AwaitThat(c.t, "the shell has given it the terminal", func() bool { return c.foreground() == c.pid })
}

// awaitStoppedJob waits until the shell, which has the terminal, knows that a job was
// stopped.
func (c *console) awaitStoppedJob() {
	c.t.Helper()
	for i := 0; c.log.Count("Stopped") == 0; i++ {
		c.press(fmt.Sprintf("jobs; echo loo''ked %d\n", i))
		c.log.Await(fmt.Sprintf("looked %d", i))
	}
}

// Two processes of the service are stopped one after the other.
func TestShellJobStopsOnce(t *testing.T) {
	t.Parallel()
	c := startShell(t, superviseArguments(nil, "puppet"), "")
	first := c.next()
	c.supervisorOf(first)
	second, helper, stranger := first.spawn(c.bed), first.spawn(c.bed), first.spawn(c.bed, "apart")
	first.do("notify", fmt.Sprintf("MAINPID=%d", second.PID))
	first.Order("exit", "0")
	first.AwaitEnd()                  // the others are the supervisor's children now
	proctest.Suspend(t, stranger.PID) // whose group is not the service's
	second.barrier()
	if group, err := unix.Getpgid(second.PID); c.foreground() != group {
		t.Errorf("group %d has the terminal, not the service's, %d: %v", c.foreground(), group, err)
	}
	proctest.Kill(t, second.PID, syscall.SIGSTOP)
	proctest.AwaitStop(c.t, c.pid)
	proctest.Kill(t, helper.PID, syscall.SIGSTOP)
	c.press("fg\n")
	second.wantSignals("SIGCONT")
	helper.wantSignals("SIGCONT")
	c.reads(second)
	c.signal(syscall.SIGUSR1)
	second.wantSignals("SIGUSR1") // the supervisor goes on, too
}

// A script goes on with the terminal that it had.
func TestScript(t *testing.T) {
	t.Parallel()
	broken := filepath.Join(t.TempDir(), "broken")
	proctest.OK(t, os.WriteFile(broken, []byte("#!/nowhere/interpreter\n"), 0o755))
	fails := strings.Join(proctest.Arguments("supervise", "--", broken), " ")
	c := startConsole(t, exec.Command("/bin/sh", append([]string{"-c", `"$@"; read line; echo "and then $line"; ` + fails + `; read line; echo "at last $line"`, "sh"},
		superviseArguments(nil, "puppet")...)...))
	main := c.next()
	c.press(ctrlZ) // which nobody could end
	main.wantSignals("SIGCONT")
	main.Order("exit", "0")
	main.AwaitEnd()
	c.press("one\n")
	c.log.Await("and then one")
	c.log.Await("run:", "can't start")
	c.press("two\n")
	c.log.Await("at last two")
}

// The shell stops and continues a script as a whole.
func TestShellScript(t *testing.T) {
	t.Parallel()
	script := append([]string{"sh", "-c", `'"$@"; exit $?'`, "sh"}, superviseArguments(nil, "puppet")...)
	c := startShell(t, script, "")
	main := c.next()
	c.supervisorOf(main)
	c.suspends()
	c.press("fg\n")
	main.wantSignals("SIGCONT")
	c.reads(main)
	main.wantNoMoreSignals()
}

// The service's input is not the terminal: Ctrl-C goes to the supervisor, which
// passes it on.
func TestShellJobWithoutInput(t *testing.T) {
	t.Parallel()
	c := startShell(t, superviseArguments(nil, "puppet"), " </dev/null")
	first := c.next()
	c.press(ctrlC)
	first.wantSignals("SIGINT")
	second := first.upgrade(c.bed)
	c.press(ctrlC)
	second.wantSignals("SIGINT")
	second.wantNoMoreSignals()
	first.wantNoMoreSignals()
}
