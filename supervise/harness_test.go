//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise_test

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/supervise"
)

// The tests' processes are this binary, started again with the name of a role. A
// service's processes, real servers or puppets, connect to a socket of their test
// and do there what it tells them. They end when the test does.

// patience bounds every wait for an event. No test passes because of it.
const patience = 30 * time.Second

// controlVariable names the test's socket.
const controlVariable = "SUPERVISE_TEST_CONTROL"

// roles is filled by the init functions of the test files.
var roles = map[string]func(arguments []string){
	"supervise": superviseRole,
	"puppet":    func([]string) { obey(true) },
	"self": func([]string) {
		if err := supervise.Self(); err != nil {
			panic(err)
		}
		obey(true)
	},
}

func TestMain(m *testing.M) {
	// The race detector would have every process sleep for a second at its end.
	os.Setenv("GORACE", "atexit_sleep_ms=0 halt_on_error=1 "+os.Getenv("GORACE"))
	if len(os.Args) > 1 {
		if run, ok := roles[os.Args[1]]; ok {
			run(os.Args[2:])
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

func superviseRole(arguments []string) {
	s := supervise.Supervisor{Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	flags := flag.NewFlagSet("supervise", flag.PanicOnError)
	flags.DurationVar(&s.StopTimeout, "stop", 0, "")
	flags.DurationVar(&s.TakeoverTimeout, "takeover", 0, "")
	flags.StringVar(&s.PIDFile, "pid-file", "", "")
	flags.DurationVar(supervise.HurryTimeout, "hurry", *supervise.HurryTimeout, "")
	flags.Parse(arguments)
	s.Command = flags.Args()
	status, err := s.Run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "run:", err)
	}
	os.Exit(status)
}

// must is for roles.
func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// obey connects to the test and does what it says. It does not return.
func obey(reportSignals bool) {
	conn := must(net.Dial("unix", os.Getenv(controlVariable)))
	var mu sync.Mutex
	say := func(kind, text string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintln(conn, kind, strconv.Quote(text))
	}
	if reportSignals {
		signals := make(chan os.Signal, 100)
		signal.Notify(signals, unix.SIGHUP, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGCONT)
		go func() {
			for sig := range signals {
				say("signal", unix.SignalName(sig.(unix.Signal)))
			}
		}()
	}
	say("hello", fmt.Sprint(os.Getpid(), " ", os.Getppid(), " ", os.Getenv("NOTIFY_SOCKET")))
	lines := bufio.NewScanner(conn)
	for lines.Scan() {
		command, argument, _ := strings.Cut(lines.Text(), " ")
		argument = must(strconv.Unquote(argument))
		say("done", do(command, argument))
	}
	os.Exit(1)
}

func do(command, argument string) string {
	switch command {
	case "exit":
		os.Exit(must(strconv.Atoi(argument)))
	case "die":
		must(0, syscall.Kill(os.Getpid(), syscall.SIGKILL))
		select {}
	case "notify":
		notify(os.Getenv("NOTIFY_SOCKET"), argument)
	case "attach": // a descriptor, and wait until it has been closed everywhere
		read, write, err := os.Pipe()
		must(0, err)
		notify(os.Getenv("NOTIFY_SOCKET"), argument, write)
		write.Close()
		must(io.Copy(io.Discard, read))
	case "spawn": // another like this
		cmd := exec.Command(os.Args[0], os.Args[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		must(0, cmd.Start())
		go cmd.Wait()
	case "orphan":
		return strings.TrimSpace(string(must(exec.Command("sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!").Output())))
	case "environment":
		return os.Getenv(argument)
	case "group":
		return strconv.Itoa(unix.Getpgrp())
	case "listen": // until the end
		listeners = append(listeners, must(net.Listen("tcp", "localhost:0")))
	case "read":
		line := make([]byte, 100)
		return string(line[:must(os.Stdin.Read(line))])
	default:
		panic("no command " + command)
	}
	return ""
}

var listeners []net.Listener

// notify is sd_notify(3), with descriptors.
func notify(address, text string, files ...*os.File) {
	fd := must(unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0))
	defer unix.Close(fd)
	var control []byte
	for _, file := range files {
		control = append(control, unix.UnixRights(int(file.Fd()))...)
	}
	must(0, unix.Sendmsg(fd, []byte(text), control, &unix.SockaddrUnix{Name: address}, 0))
}

// A bed is a supervisor with what is underneath it.
type bed struct {
	t          *testing.T
	dir        string
	supervisor *exec.Cmd
	pid        int // the supervisor's
	log        *journal
	puppets    chan *puppet
	status     chan int
}

// newBed prepares for processes that connect.
func newBed(t *testing.T) *bed {
	t.Helper()
	// Not t.TempDir, as the path of a socket has a limit.
	dir, err := os.MkdirTemp("", "supervise")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &bed{t: t, dir: dir, log: newJournal(t), puppets: make(chan *puppet, 100), status: make(chan int, 1)}
	control, err := net.Listen("unix", filepath.Join(b.dir, "control"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() })
	go func() {
		for {
			conn, err := control.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
			go b.welcome(conn)
		}
	}()
	return b
}

// startBed starts a supervisor of this binary in a role.
func startBed(t *testing.T, flags []string, role ...string) *bed {
	t.Helper()
	b := newBed(t)
	b.start(exec.Command(os.Args[0], superviseArguments(flags, role)...))
	return b
}

func superviseArguments(flags []string, role []string) []string {
	arguments := append([]string{"supervise"}, flags...)
	return append(append(arguments, "--", os.Args[0]), role...)
}

// start starts the supervisor, and reads its log.
func (b *bed) start(cmd *exec.Cmd) {
	b.t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		b.t.Fatal(err)
	}
	defer write.Close()
	cmd.Stdout, cmd.Stderr = write, write
	b.run(cmd)
	go b.log.read(read)
}

func (b *bed) run(cmd *exec.Cmd) {
	b.t.Helper()
	cmd.Env = append(cmd.Environ(), controlVariable+"="+filepath.Join(b.dir, "control"))
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.supervisor, b.pid = cmd, cmd.Process.Pid
	reaped := make(chan struct{})
	go func() {
		cmd.Wait()
		status := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if status.Signaled() {
			b.status <- 128 + int(status.Signal())
		} else {
			b.status <- status.ExitStatus()
		}
		close(reaped)
	}()
	b.t.Cleanup(func() {
		cmd.Process.Kill()
		<-reaped
	})
}

// signal sends the supervisor a signal.
func (b *bed) signal(sig syscall.Signal) {
	b.t.Helper()
	if err := syscall.Kill(b.pid, sig); err != nil {
		b.t.Fatal(err)
	}
}

// ends waits for the end of the supervisor.
func (b *bed) ends(status int) {
	b.t.Helper()
	select {
	case got := <-b.status:
		if got != status {
			b.t.Fatalf("exit status %d, want %d", got, status)
		}
	case <-time.After(patience):
		b.t.Fatal("the supervisor does not end")
	}
}

// A puppet is a process of the service as its test sees it.
type puppet struct {
	t           *testing.T
	conn        net.Conn
	pid, parent int
	address     string // NOTIFY_SOCKET
	signals     chan string
	replies     chan string // closed when the process has ended
}

func (b *bed) welcome(conn net.Conn) {
	p := &puppet{t: b.t, conn: conn, signals: make(chan string, 100), replies: make(chan string, 100)}
	defer close(p.replies)
	lines := bufio.NewScanner(conn)
	for lines.Scan() {
		kind, text, _ := strings.Cut(lines.Text(), " ")
		text, _ = strconv.Unquote(text)
		switch kind {
		case "hello":
			fmt.Sscan(text, &p.pid, &p.parent, &p.address)
			b.puppets <- p
		case "signal":
			p.signals <- text
		case "done":
			p.replies <- text
		}
	}
}

// next waits for the next process of the service to start.
func (b *bed) next() *puppet {
	b.t.Helper()
	select {
	case p := <-b.puppets:
		return p
	case <-time.After(patience):
		b.t.Fatal("no process of the service has started")
		panic("unreachable")
	}
}

// tell has the puppet begin to do something.
func (p *puppet) tell(command, argument string) {
	p.t.Helper()
	if _, err := fmt.Fprintln(p.conn, command, strconv.Quote(argument)); err != nil {
		p.t.Fatal(err)
	}
}

// do returns when it is done.
func (p *puppet) do(command, argument string) string {
	p.t.Helper()
	p.tell(command, argument)
	return p.done()
}

func (p *puppet) done() string {
	p.t.Helper()
	select {
	case reply, ok := <-p.replies:
		if !ok {
			p.t.Fatalf("process %d has ended", p.pid)
		}
		return reply
	case <-time.After(patience):
		p.t.Fatalf("process %d does not answer", p.pid)
		panic("unreachable")
	}
}

// barrier returns when the supervisor has heeded what was said before.
func (p *puppet) barrier() {
	p.t.Helper()
	p.do("attach", "BARRIER=1")
}

// spawn starts a child like p.
func (p *puppet) spawn(b *bed) *puppet {
	p.t.Helper()
	p.do("spawn", "")
	return b.next()
}

// upgrade starts a child, and hands over to it.
func (p *puppet) upgrade(b *bed) *puppet {
	p.t.Helper()
	p.do("notify", "RELOADING=1\nMONOTONIC_USEC=1")
	child := p.spawn(b)
	p.do("notify", fmt.Sprintf("MAINPID=%d\nREADY=1\nSTATUS=", child.pid))
	p.barrier()
	return child
}

// gets expects these signals, in this order, and no other before them.
func (p *puppet) gets(signals ...string) {
	p.t.Helper()
	for _, want := range signals {
		if got := p.signal(); got != want {
			p.t.Fatalf("process %d got %s, want %s", p.pid, got, want)
		}
	}
}

// getsBoth expects two signals that were sent one after the other, and may come in
// the order of their numbers.
func (p *puppet) getsBoth(a, b string) {
	p.t.Helper()
	if x, y := p.signal(), p.signal(); (x != a || y != b) && (x != b || y != a) {
		p.t.Fatalf("process %d got %s and %s, want %s and %s", p.pid, x, y, a, b)
	}
}

func (p *puppet) signal() string {
	p.t.Helper()
	select {
	case got := <-p.signals:
		return got
	case <-time.After(patience):
		p.t.Fatalf("process %d waits for a signal", p.pid)
		panic("unreachable")
	}
}

// getsNoMore expects that no signal was sent that was not expected. The kernel and
// the Go runtime deliver in the order of the numbers, of which this one's is high.
func (p *puppet) getsNoMore() {
	p.t.Helper()
	if err := syscall.Kill(p.pid, syscall.SIGWINCH); err != nil {
		p.t.Fatal(err)
	}
	p.gets("SIGWINCH")
}

// ends waits for the end of the puppet.
func (p *puppet) ends() {
	p.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case _, ok := <-p.replies:
			if !ok {
				return
			}
		case <-timeout:
			p.t.Fatalf("process %d does not end", p.pid)
		}
	}
}

// A journal is the output of the supervisor and its service.
type journal struct {
	t     *testing.T
	mu    sync.Mutex
	lines []string
	seen  int // by await
	more  chan struct{}
	text  bytes.Buffer // the last line so far
}

func newJournal(t *testing.T) *journal {
	j := &journal{t: t, more: make(chan struct{}, 1)}
	t.Cleanup(func() {
		if t.Failed() {
			j.mu.Lock()
			defer j.mu.Unlock()
			t.Logf("output:\n%s", strings.Join(j.lines, "\n"))
		}
	})
	return j
}

func (j *journal) read(from io.ReadCloser) {
	defer from.Close()
	buffer := make([]byte, 1<<12)
	for {
		n, err := from.Read(buffer)
		j.mu.Lock()
		j.text.Write(buffer[:n])
		for {
			line, rest, ok := bytes.Cut(j.text.Bytes(), []byte("\n"))
			if !ok {
				break
			}
			j.lines = append(j.lines, string(line))
			j.text = *bytes.NewBuffer(bytes.Clone(rest))
		}
		j.mu.Unlock()
		select {
		case j.more <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// await waits for a line with all these parts, after the last that was awaited.
func (j *journal) await(parts ...string) string {
	j.t.Helper()
	timeout := time.After(patience)
	for {
		if line, ok := j.find(parts); ok {
			return line
		}
		select {
		case <-j.more:
		case <-timeout:
			j.t.Fatalf("waited for a line with %q", parts)
		}
	}
}

func (j *journal) find(parts []string) (string, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
lines:
	for i, line := range j.lines[j.seen:] {
		for _, part := range parts {
			if !strings.Contains(line, part) {
				continue lines
			}
		}
		j.seen += i + 1
		return line, true
	}
	return "", false
}

// until calls done until it reports true.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	timeout := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("waited too long until %s", what)
		}
	}
}
