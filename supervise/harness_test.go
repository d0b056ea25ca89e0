//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise_test

import (
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/supervise"
)

// A service's processes are real servers or puppets. Both have a wire, and do what the
// test orders. Roles are passed as arguments, because that is what a supervisor is told
// of its service. The roles' Arg is the directory of the bed.

func TestMain(m *testing.M) { proctest.Main(m) }

func init() {
	proctest.Role("supervise", superviseRole)
	proctest.Role("puppet", puppetRole)
	proctest.Role("self", func() {
		proctest.Must(0, supervise.Self())
		puppetRole()
	})
}

func superviseRole() {
	s := supervise.Supervisor{Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	flags := flag.NewFlagSet("supervise", flag.PanicOnError)
	flags.DurationVar(&s.StopTimeout, "stop", 0, "")
	flags.DurationVar(&s.TakeoverTimeout, "takeover", 0, "")
	flags.StringVar(&s.PIDFile, "pid-file", "", "")
	flags.DurationVar(supervise.HurryTimeout, "hurry", *supervise.HurryTimeout, "")
	flags.DurationVar(supervise.KillTimeout, "kill", *supervise.KillTimeout, "")
	flags.DurationVar(supervise.FlushTimeout, "flush", *supervise.FlushTimeout, "")
	flags.Parse(os.Args[2:])
	s.Command = flags.Args()
	status, err := s.Run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "run:", err)
	}
	os.Exit(status)
}

// puppetRole obeys, and reports signals. It does not return.
func puppetRole() {
	signals := make(chan os.Signal, 100)
	signal.Notify(signals, unix.SIGHUP, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGCONT)
	w := proctest.OpenWire()
	go func() {
		for sig := range signals {
			w.Report("signal", unix.SignalName(sig.(unix.Signal)))
		}
	}()
	obey(w)
}

func obey(w *proctest.Wire) {
	for o := range w.Orders() {
		w.Report("done", do(o.Do, strings.Join(o.Arguments, " ")))
	}
}

func do(command, argument string) string {
	switch command {
	case "exit":
		os.Exit(proctest.Must(strconv.Atoi(argument)))
	case "die":
		proctest.Must(0, syscall.Kill(os.Getpid(), syscall.SIGKILL))
		select {}
	case "notify":
		notify(os.Getenv("NOTIFY_SOCKET"), argument)
	case "attach": // a descriptor, and wait until it has been closed everywhere
		read, write, err := os.Pipe()
		proctest.Must(0, err)
		notify(os.Getenv("NOTIFY_SOCKET"), argument, write)
		write.Close()
		proctest.Must(io.Copy(io.Discard, read))
	case "spawn": // another like this: "apart", in a group of its own; "unreaped", which nobody waits for
		cmd := exec.Command(os.Args[0], os.Args[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: argument == "apart"}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		proctest.Must(0, cmd.Start())
		if argument != "unreaped" {
			go cmd.Wait()
		}
	case "respawn": // an orphan like this, which gets this PID if it can
		const script = `echo $(($0 - 1)) >/proc/sys/kernel/ns_last_pid; "$@" &`
		cmd := exec.Command("sh", append([]string{"-c", script, argument}, os.Args...)...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		proctest.Must(0, cmd.Run())
	case "outlive": // another, until somebody has waited for it
		for pid := proctest.Must(strconv.Atoi(argument)); syscall.Kill(pid, 0) != syscall.ESRCH; {
			time.Sleep(time.Millisecond) // a poll
		}
	case "orphan":
		return strings.TrimSpace(string(proctest.Must(exec.Command("sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!").Output())))
	case "environment":
		return os.Getenv(argument)
	case "parent":
		return strconv.Itoa(os.Getppid())
	case "listen": // until the end
		listeners = append(listeners, proctest.Must(net.Listen("tcp", "localhost:0")))
	case "stty": // which sets what is set already
		cmd := exec.Command("stty", "echo")
		cmd.Stdin = os.Stdin
		proctest.Must(cmd.Output())
	case "read":
		line := make([]byte, 100)
		return string(line[:proctest.Must(os.Stdin.Read(line))])
	default:
		panic("no command " + command)
	}
	return ""
}

var listeners []net.Listener

// notify is sd_notify(3), with descriptors.
func notify(address, text string, files ...*os.File) {
	fd := proctest.Must(unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0))
	defer unix.Close(fd)
	var control []byte
	for _, file := range files {
		control = append(control, unix.UnixRights(int(file.Fd()))...)
	}
	proctest.Must(0, unix.Sendmsg(fd, []byte(text), control, &unix.SockaddrUnix{Name: address}, 0))
}

// A bed is a supervisor with what is underneath it.
type bed struct {
	t          *testing.T
	dir        string
	service    *proctest.Service
	log        *proctest.Output // of the supervisor and its service
	supervisor *exec.Cmd
	pid        int             // the supervisor's
	reaped     <-chan struct{} // see proctest.Service.Start
}

func newBed(t *testing.T) *bed {
	t.Helper()
	return &bed{t: t, dir: proctest.SocketDir(t), service: proctest.NewService(t), log: proctest.NewOutput(t)}
}

// startBed starts a supervisor of this binary in a role.
func startBed(t *testing.T, flags []string, role string) *bed {
	t.Helper()
	b := newBed(t)
	b.start(supervisor(flags, role))
	return b
}

func command(arguments []string) *exec.Cmd { return exec.Command(arguments[0], arguments[1:]...) }

// supervisor returns a command for a supervisor of this binary in a role.
func supervisor(flags []string, role string) *exec.Cmd {
	return command(superviseArguments(flags, role))
}

func superviseArguments(flags []string, role string) []string {
	arguments := append(proctest.Arguments("supervise", flags...), "--")
	return append(arguments, proctest.Arguments(role)...)
}

// start starts the supervisor, and reads its log.
func (b *bed) start(cmd *exec.Cmd) {
	b.t.Helper()
	read, write, err := os.Pipe()
	proctest.OK(b.t, err)
	defer write.Close()
	cmd.Stdout, cmd.Stderr = write, write
	b.run(cmd)
	go b.log.Read(read)
}

func (b *bed) run(cmd *exec.Cmd) {
	b.t.Helper()
	cmd.Env = append(cmd.Environ(), b.service.Wire(), proctest.WithArg(b.dir))
	b.reaped = b.service.Start(cmd)
	b.supervisor, b.pid = cmd, cmd.Process.Pid
}

// signal sends the supervisor a signal.
func (b *bed) signal(sig syscall.Signal) {
	b.t.Helper()
	proctest.Kill(b.t, b.pid, sig)
}

// wantStatus waits for the end of the supervisor.
func (b *bed) wantStatus(want int) {
	b.t.Helper()
	if got := b.awaitStatus(); got != want {
		b.t.Fatalf("exit status %d, want %d", got, want)
	}
}

// awaitStatus returns what a shell would.
func (b *bed) awaitStatus() int {
	b.t.Helper()
	proctest.Within(b.t, "the end of the supervisor", b.reaped)
	status := b.supervisor.ProcessState.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// next waits for the next process of the service to start.
func (b *bed) next() *puppet {
	b.t.Helper()
	return &puppet{b.service.Next(), b.t}
}

// A puppet is a process of the service as its test sees it.
type puppet struct {
	*proctest.Process
	t *testing.T
}

// do has the puppet do something, and returns when it is done.
func (p *puppet) do(order string, arguments ...string) string {
	p.t.Helper()
	p.Order(order, arguments...)
	return p.Take("done").Text
}

// barrier returns when the supervisor has heeded what was said before.
func (p *puppet) barrier() {
	p.t.Helper()
	p.do("attach", "BARRIER=1")
}

// spawn starts a child like p.
func (p *puppet) spawn(b *bed, how ...string) *puppet {
	p.t.Helper()
	p.do("spawn", how...)
	return b.next()
}

// beginUpgrade says what a process says before it starts a child.
func (p *puppet) beginUpgrade() {
	p.t.Helper()
	p.do("notify", "RELOADING=1\nMONOTONIC_USEC=1")
}

// upgrade starts a child, and hands over to it.
func (p *puppet) upgrade(b *bed, how ...string) *puppet {
	p.t.Helper()
	p.beginUpgrade()
	child := p.spawn(b, how...)
	p.do("notify", fmt.Sprintf("MAINPID=%d\nREADY=1\nSTATUS=", child.PID))
	p.barrier()
	return child
}

// wantSignals expects these signals, in this order, and no other before them.
func (p *puppet) wantSignals(signals ...string) {
	p.t.Helper()
	for _, want := range signals {
		if got := p.Take("signal").Text; got != want {
			p.t.Fatalf("process %d got %s, want %s", p.PID, got, want)
		}
	}
}

// wantBothSignals expects two signals that were sent one after the other, and may come
// in the order of their numbers.
func (p *puppet) wantBothSignals(a, b string) {
	p.t.Helper()
	if x, y := p.Take("signal").Text, p.Take("signal").Text; (x != a || y != b) && (x != b || y != a) {
		p.t.Fatalf("process %d got %s and %s, want %s and %s", p.PID, x, y, a, b)
	}
}

// wantNoMoreSignals expects that no signal was sent that was not expected. The kernel
// and the Go runtime deliver in the order of the numbers, of which this one's is high.
func (p *puppet) wantNoMoreSignals() {
	p.t.Helper()
	proctest.Kill(p.t, p.PID, syscall.SIGWINCH)
	p.wantSignals("SIGWINCH")
}
