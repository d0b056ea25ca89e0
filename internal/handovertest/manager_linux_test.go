package handovertest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/queue"
	"example.com/tableflip/internal/step"
)

// These tests are about the messages to a service manager: from whom, and in which order.

// A manager is a mock of the service manager. It reads messages and answers barriers at
// once.
type manager struct {
	t        *testing.T
	socket   string // NOTIFY_SOCKET
	conn     *net.UnixConn
	started  time.Duration // monotonic
	messages chan notification
	lazy     atomic.Bool // it keeps the descriptors of barriers
	store    []stored
}

// A notification is a message, with MONOTONIC_USEC=now if that is true.
type notification struct {
	PID  int
	Text string
	file *os.File // of a descriptor that came with it
}

// A stored descriptor is one in the descriptor store.
type stored struct {
	name string
	file *os.File
}

const (
	reloading = "RELOADING=1\nMONOTONIC_USEC=now"
	barrier   = "BARRIER=1"
	last      = "X_LAST=1"
)

func storing(name string) string { return "FDSTORE=1\nFDNAME=" + name + "\nFDPOLL=0" }

func removing(name string) string { return "FDSTOREREMOVE=1\nFDNAME=" + name }

func failed(err error) string { return "READY=1\nSTATUS=upgrade failed: " + err.Error() }

func mainPID(pid int) string { return fmt.Sprintf("MAINPID=%d\nREADY=1\nSTATUS=", pid) }

// bindManager makes the socket of a systemd that reads nothing.
func bindManager(t *testing.T) *manager {
	t.Helper()
	m := &manager{t: t, socket: filepath.Join(proctest.SocketDir(t), "notify"), started: monotonic()}
	m.bind()
	return m
}

func (m *manager) bind() {
	m.t.Helper()
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		controlErr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
		})
		return errors.Join(controlErr, err)
	}}
	conn := proctest.Opened[net.PacketConn](m.t)(config.ListenPacket(context.Background(), "unixgram", m.socket))
	m.conn = conn.(*net.UnixConn)
}

// newManager is for tests whose processes it has started: the first generation's
// environment must have m.variable.
func newManager(t *testing.T) *manager {
	t.Helper()
	m := bindManager(t)
	m.read()
	return m
}

// startedByManager is for tests that are the first generation themselves.
func startedByManager(t *testing.T) *manager {
	t.Helper()
	m := newManager(t)
	t.Setenv("NOTIFY_SOCKET", m.socket)
	return m
}

func (m *manager) variable() string { return "NOTIFY_SOCKET=" + m.socket }

func monotonic() time.Duration {
	var now unix.Timespec
	proctest.Must(0, unix.ClockGettime(unix.CLOCK_MONOTONIC, &now))
	return time.Duration(now.Nano())
}

func (m *manager) read() {
	m.messages = make(chan notification, 1000)
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			n, err := m.receive()
			if err != nil {
				return
			}
			m.messages <- n
		}
	})
	m.t.Cleanup(func() {
		m.conn.Close()
		reading.Wait()
		close(m.messages)
		for n := range m.messages {
			n.file.Close()
		}
		for _, s := range m.store {
			s.file.Close()
		}
	})
}

func (m *manager) receive() (notification, error) {
	buffer, control := make([]byte, 4096), make([]byte, 256)
	length, controlLength, _, _, err := m.conn.ReadMsgUnix(buffer, control)
	if err != nil {
		return notification{}, err
	}
	n := notification{Text: string(buffer[:length])}
	for _, c := range proctest.Must(unix.ParseSocketControlMessage(control[:controlLength])) {
		if credentials, err := unix.ParseUnixCredentials(&c); err == nil {
			n.PID = int(credentials.Pid)
		}
		if fds, err := unix.ParseUnixRights(&c); err == nil {
			n.file = os.NewFile(uintptr(fds[0]), "passed")
		}
	}
	if n.Text == barrier && !m.lazy.Load() {
		n.file.Close()
	}
	if before, usec, found := strings.Cut(n.Text, "MONOTONIC_USEC="); found {
		at, err := strconv.ParseInt(usec, 10, 64)
		if d := time.Duration(at) * time.Microsecond; err == nil && d >= m.started.Truncate(time.Microsecond) && d <= monotonic() {
			n.Text = before + "MONOTONIC_USEC=now"
		}
	}
	return n, nil
}

// next returns the next message, whatever it is, and does what it says to the
// descriptor store.
func (m *manager) next() notification {
	m.t.Helper()
	n := proctest.Within(m.t, "a message to systemd", m.messages)
	_, name, _ := strings.Cut(n.Text, "FDNAME=")
	name, _, _ = strings.Cut(name, "\n")
	switch {
	case strings.HasPrefix(n.Text, "FDSTORE=1\n"):
		m.store = append(m.store, stored{name, n.file})
	case strings.HasPrefix(n.Text, "FDSTOREREMOVE=1\n"):
		m.store = slices.DeleteFunc(m.store, func(s stored) bool {
			if s.name == name {
				s.file.Close()
			}
			return s.name == name
		})
	}
	return n
}

// want checks that the next messages are these and come from the process pid.
func (m *manager) want(pid int, texts ...string) {
	m.t.Helper()
	for _, text := range texts {
		if n := m.next(); n.PID != pid || n.Text != text {
			m.t.Fatalf("%d told systemd %q; want %q from %d", n.PID, n.Text, text, pid)
		}
	}
}

// wantNoMore checks that systemd has been told nothing that was not expected.
func (m *manager) wantNoMore() {
	m.t.Helper()
	m.sendLast()
	m.want(os.Getpid(), last)
}

// sendLast queues the message last behind those that were sent before.
func (m *manager) sendLast() {
	m.t.Helper()
	conn := proctest.Opened[*net.UnixConn](m.t)(net.DialUnix("unixgram", nil, m.conn.LocalAddr().(*net.UnixAddr)))
	proctest.Must(io.WriteString(conn, last))
	conn.Close()
}

// die closes the socket. What was sent and not read is gone, as are its descriptors.
func (m *manager) die() {
	m.conn.Close()
}

// clog fills the queue, so that whoever sends more must wait.
func (m *manager) clog() {
	m.t.Helper()
	for m.clogFromOne() > 0 { // until another socket can't send anything either
	}
}

// clogFromOne sends as much as one socket, whose own buffer may be smaller than the queue, can.
func (m *manager) clogFromOne() (sent int) {
	m.t.Helper()
	fd := proctest.Must(unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0))
	defer unix.Close(fd)
	for {
		err := unix.Sendto(fd, []byte("X_CLOG=1"), 0, &unix.SockaddrUnix{Name: m.socket})
		if errors.Is(err, unix.EAGAIN) {
			return sent
		}
		proctest.OK(m.t, err)
		sent++
	}
}

// awaitQueue waits until there is something to read.
func (m *manager) awaitQueue() {
	m.t.Helper()
	proctest.OK(m.t, proctest.Must(m.conn.SyscallConn()).Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK)
		return !errors.Is(err, unix.EAGAIN)
	}))
}

func TestManagerUpgrade(t *testing.T) {
	for _, test := range []struct{ name, prefix string }{
		{"file", ""},
		{"abstract", "@"},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := &manager{t: t, socket: test.prefix + filepath.Join(proctest.SocketDir(t), "notify"), started: monotonic()}
			m.bind()
			m.read()
			t.Setenv("NOTIFY_SOCKET", m.socket)
			logger, logbook := proctest.NewLogger()
			upg, s := NewParent(t, tableflip.Options{Logger: logger}, "succeed")
			m.wantNoMore()
			Upgrade(t, upg)
			child := s.Await("ready")
			s.AwaitEnd()
			upg.Stop()
			m.want(os.Getpid(), "READY=1", reloading, mainPID(child.PID), barrier)
			m.wantNoMore()
			for len(logbook) > 0 {
				if line := <-logbook; strings.Contains(line, "service manager") {
					t.Error(line)
				}
			}
		})
	}
}

// Told nothing, systemd would end the service with its old main process.
func TestManagerNoDescriptor(t *testing.T) {
	m := startedByManager(t)
	upg, s := NewParent(t, tableflip.Options{}, "succeed")
	var before unix.Rlimit
	proctest.OK(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &before))
	proctest.During(t, step.AfterCommit, func() {
		unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: before.Max})
	})
	proctest.OK(t, upg.Ready())
	err := upg.Upgrade()
	proctest.OK(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &before))
	proctest.OK(t, err)
	child := s.Await("ready")
	s.AwaitEnd()
	m.want(os.Getpid(), "READY=1", reloading, mainPID(child.PID), barrier)
}

// As long as it can still be told that the upgrade has failed, there is none.
func TestManagerNoDescriptorEarly(t *testing.T) {
	m := startedByManager(t)
	upg, _ := NewParent(t, tableflip.Options{}, "succeed")
	var before unix.Rlimit
	proctest.OK(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &before))
	restore := proctest.During(t, step.ReadyReceived, func() {
		unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: before.Max})
	})
	proctest.OK(t, upg.Ready())
	err := upg.Upgrade()
	restore()
	proctest.OK(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &before))
	proctest.WantError(t, "Upgrade", err, syscall.EMFILE)
	m.want(os.Getpid(), "READY=1", reloading)
	proctest.OK(t, upg.Upgrade())
}

// A supervisor is told as systemd is.
func TestManagerSupervisor(t *testing.T) {
	t.Parallel()
	m := newManager(t)
	c, g, _ := startChain(t, m.variable(), fmt.Sprint("TABLEFLIP_SUPERVISOR=", os.Getpid()))
	m.want(g.PID, "READY=1")
	next := c.upgrade(g)
	m.want(g.PID, reloading, mainPID(next.PID), barrier)
	c.wantStop(next)
}

// The process that serves need not be the one that was started.
func TestManagerWrapper(t *testing.T) {
	m := startedByManager(t)
	var started *exec.Cmd
	upg, s := NewParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
		proctest.Shell(`"$0" & wait`)(cmd)
		started = cmd
	}}, "succeed")
	Upgrade(t, upg)
	child := s.Await("ready")
	if child.PID == started.Process.Pid {
		t.Fatal("no wrapper was started")
	}
	m.want(os.Getpid(), "READY=1", reloading, mainPID(child.PID), barrier)
	s.AwaitEnd()
}

func TestManagerFailure(t *testing.T) {
	ended, end := context.WithCancel(context.Background())
	end()
	for _, test := range []struct {
		name, role string
		opts       tableflip.Options
		ctx        context.Context
		step       step.Step // at which the context ends
	}{
		{name: "exit status", role: "fail"},
		{name: "timeout", role: "hang", opts: tableflip.Options{UpgradeTimeout: time.Second}},
		{name: "crash", role: "crash"},
		{name: "reason", role: "fail", opts: tableflip.Options{Command: proctest.Shell("echo failed no disk >&3")}},
		{name: "cancelled", role: "succeed", step: step.ReadyReceived},
		{name: "cancelled before", role: "succeed", ctx: ended},
		{name: "cancelled before, which would be kept", role: "succeed", ctx: queue.Keeping(ended)},
		{name: "not startable", role: "fail", opts: tableflip.Options{Command: proctest.Unstartable}},
		{name: "files of its own", role: "fail", opts: tableflip.Options{Command: func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{os.Stderr} }}},
		{name: "unreadable PID file", role: "fail", opts: tableflip.Options{PIDFile: filepath.Join(t.TempDir(), "pid")}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := startedByManager(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if test.step != (step.Step{}) {
				proctest.During(t, test.step, cancel)
			}
			if test.ctx != nil {
				ctx = test.ctx
			}
			upg, _ := NewParent(t, test.opts, test.role)
			proctest.OK(t, upg.Ready())
			if test.opts.PIDFile != "" {
				proctest.OK(t, os.Remove(test.opts.PIDFile))
				proctest.OK(t, os.Mkdir(test.opts.PIDFile, 0o700))
			}
			err := upg.UpgradeContext(ctx)
			if err == nil {
				t.Fatal("the upgrade succeeded")
			}
			m.want(os.Getpid(), "READY=1", reloading, failed(err))
			m.wantNoMore()
			upg.Stop()
			m.want(os.Getpid(), "STOPPING=1")
			upg.Stop()
			m.wantNoMore()
		})
	}
}

func init() {
	proctest.Role("crash", func() {
		proctest.Must(tableflip.New(tableflip.Options{}))
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	})
}

func TestManagerPanic(t *testing.T) {
	m := startedByManager(t)
	upg, _ := NewParent(t, tableflip.Options{Command: func(*exec.Cmd) { panic("as told") }}, "succeed")
	proctest.OK(t, upg.Ready())
	func() {
		defer func() { _ = recover() }()
		upg.Upgrade()
	}()
	m.want(os.Getpid(), "READY=1", reloading, failed(errors.New("tableflip: Options.Command has panicked")))
}

// The manager does not hear of a rehearsal, unless it asks meanwhile.
func TestManagerRehearsal(t *testing.T) {
	shorten(t, &step.ExitGrace)
	m := startedByManager(t)
	upg, s := NewParent(t, tableflip.Options{}, "hang")
	proctest.WantError(t, "Rehearse", upg.Rehearse(t.Context()), tableflip.ErrNotReady)
	proctest.OK(t, upg.Ready())
	rehearse := func(meanwhile func()) {
		ctx, cancel := context.WithCancel(t.Context())
		result := proctest.InBackground(func() error { return upg.Rehearse(ctx) })
		s.Await("hanging")
		meanwhile()
		cancel()
		proctest.WantError(t, "Rehearse", proctest.Within(t, "Rehearse", result), context.Canceled)
	}
	rehearse(func() {})
	ended, end := context.WithCancel(t.Context())
	end()
	proctest.WantError(t, "Rehearse", upg.Rehearse(ended), context.Canceled)
	m.want(os.Getpid(), "READY=1")
	m.wantNoMore()
	rehearse(func() { upg.Upgrade() })
	m.want(os.Getpid(), reloading, failed(tableflip.ErrUpgradeInProgress))
	m.wantNoMore()

	// Nor does the one that asks for an upgrade hear of a rehearsal that is refused.
	ctx, cancel := context.WithCancel(t.Context())
	result := proctest.InBackground(func() error { return upg.UpgradeContext(ctx) })
	s.Await("hanging")
	proctest.WantError(t, "Rehearse", upg.Rehearse(t.Context()), tableflip.ErrUpgradeInProgress)
	cancel()
	err := proctest.Within(t, "Upgrade", result)
	m.want(os.Getpid(), reloading, failed(err))
	m.wantNoMore()
}

// An upgrade that has to wait is told at once, because a reload would time out.
func TestManagerQueue(t *testing.T) {
	shorten(t, &step.ExitGrace)
	const queued = "READY=1\nSTATUS=upgrade queued"
	m := startedByManager(t)
	upg, s := NewParent(t, tableflip.Options{}, "hang")
	queue.Keep() // a process that is not up has nothing to answer
	proctest.OK(t, upg.Ready())
	queue.Keep()
	m.want(os.Getpid(), "READY=1", reloading, queued)

	attempt := func(try func(context.Context) error, answers func(error) []string) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		result := proctest.InBackground(func() error { return try(ctx) })
		s.Await("hanging")
		queue.Keep()
		cancel()
		err := proctest.Within(t, "Upgrade", result)
		m.want(os.Getpid(), answers(err)...)
		m.wantNoMore()
	}
	attempt(upg.UpgradeContext, func(err error) []string { return []string{reloading, reloading, failed(err)} })
	attempt(upg.Rehearse, func(error) []string { return []string{reloading, queued} })

	upg.Stop()
	queue.Keep()
	m.want(os.Getpid(), "STOPPING=1")
	m.wantNoMore()
}

// A process that was replaced passes what it was asked for on. Where nobody makes
// upgrades later, the reload is answered all the same.
func TestManagerQueuePassedOn(t *testing.T) {
	for _, test := range []struct {
		heeds bool
		want  []string
	}{
		{true, nil},
		{false, []string{reloading, "READY=1"}},
	} {
		t.Run(fmt.Sprint("heeds ", test.heeds), func(t *testing.T) {
			m := startedByManager(t)
			upg, s := NewParent(t, tableflip.Options{}, "asked", proctest.WithArg(fmt.Sprint(test.heeds)))
			Upgrade(t, upg)
			child := s.Await("ready").PID
			m.want(os.Getpid(), "READY=1", reloading, mainPID(child), barrier)
			queue.Keep()
			if test.heeds {
				s.Await("asked")
			}
			m.want(child, test.want...)
			m.wantNoMore()
		})
	}
}

func init() {
	proctest.Role("asked", func() {
		var asked <-chan struct{}
		if proctest.Arg() == "true" {
			asked = queue.Asked()
		}
		MustBeReady(proctest.Must(tableflip.New(tableflip.Options{})))
		proctest.Report("ready")
		<-asked
		proctest.Report("asked")
		proctest.UntilKilled()
	})
}

// What is opened to tell the manager of a handover is closed when there is none.
func TestManagerRehearsalLeaks(t *testing.T) {
	m := startedByManager(t)
	upg, _ := NewParent(t, tableflip.Options{}, "rehearse", proctest.WithArg("succeeds "+proctest.SocketDir(t)))
	proctest.OK(t, upg.Ready())
	proctest.WithoutGC(t)
	proctest.OK(t, upg.Rehearse(t.Context()))
	before := proctest.OpenDescriptors()
	proctest.OK(t, upg.Rehearse(t.Context()))
	if after := proctest.OpenDescriptors(); after != before {
		t.Errorf("%d descriptors are open, and %d were", after, before)
	}
	m.want(os.Getpid(), "READY=1")
	m.wantNoMore()
}

// Nor does it stay open if the handover fails in the last moment.
func TestManagerFailureLeaks(t *testing.T) {
	for _, cancels := range []bool{false, true} {
		t.Run(fmt.Sprint("cancels ", cancels), func(t *testing.T) {
			m := startedByManager(t)
			script := "{ echo here -; echo ready; read -r verdict; echo failed no disk; } >&3 <&4"
			upg := NewUpgrader(t, tableflip.Options{Command: proctest.Shell(script)})
			proctest.OK(t, upg.Ready())
			m.want(os.Getpid(), "READY=1")
			proctest.WithoutGC(t)
			open := 0
			for i := range 3 {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				restore := proctest.During(t, step.ReadyReceived, func() {
					if cancels {
						cancel()
					}
				})
				err := upg.UpgradeContext(ctx)
				restore()
				m.want(os.Getpid(), reloading, failed(err))
				if i == 0 { // what is opened once is open now
					open = proctest.OpenDescriptors()
				}
			}
			if now := proctest.OpenDescriptors(); now != open {
				t.Errorf("%d descriptors were open, and %d are", open, now)
			}
		})
	}
}

// Nor does it if the child takes charge after all.
func TestManagerLateLeaks(t *testing.T) {
	startedByManager(t)
	shorten(t, &step.AcknowledgeTimeout)
	late := filepath.Join(t.TempDir(), "late")
	script := `{ echo here -; echo ready; until test -e ` + late + `; do sleep 0.1; done; echo acknowledged; cat >/dev/null; } >&3 <&4 &`
	upg := NewUpgrader(t, tableflip.Options{Command: proctest.Shell(script)})
	proctest.OK(t, upg.Ready())
	proctest.WithoutGC(t)
	proctest.WantError(t, "Upgrade", upg.Upgrade(), os.ErrDeadlineExceeded)
	before := proctest.OpenDescriptors()
	proctest.OK(t, os.WriteFile(late, nil, 0o600))
	proctest.Within(t, "Exit, because the child is in charge", upg.Exit())
	proctest.AwaitThat(t, "no more is open than before", func() bool { return proctest.OpenDescriptors() <= before })
}

// With Type=notify-reload, every reload is answered: one that meets an upgrade, by
// the end of that.
func TestManagerReload(t *testing.T) {
	m := startedByManager(t)
	upg, s := NewParent(t, tableflip.Options{}, "hang")
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancel(context.Background())
	result := proctest.InBackground(func() error { return upg.UpgradeContext(ctx) })
	s.Await("hanging")
	proctest.WantError(t, "the second upgrade", upg.Upgrade(), tableflip.ErrUpgradeInProgress)
	proctest.WantError(t, "a rehearsal", upg.Rehearse(t.Context()), tableflip.ErrUpgradeInProgress)
	cancel()
	err := proctest.Within(t, "Upgrade", result)
	m.want(os.Getpid(), "READY=1", reloading, reloading, failed(err))
	m.wantNoMore()
}

// One that succeeds answers it, too.
func TestManagerReloadSucceeds(t *testing.T) {
	m := startedByManager(t)
	upg, s := NewParent(t, tableflip.Options{}, "succeed")
	proctest.During(t, step.ReadyReceived, func() {
		proctest.WantError(t, "the second upgrade", upg.Upgrade(), tableflip.ErrUpgradeInProgress)
	})
	Upgrade(t, upg)
	m.want(os.Getpid(), "READY=1", reloading, reloading, mainPID(s.Await("ready").PID), barrier)
	m.wantNoMore()
}

// A reload that comes while the old process drains is answered, too, by the new one.
func TestManagerReloadDrain(t *testing.T) {
	for asks, answer := range map[string]string{
		"once":  failed(tableflip.ErrParentRunning),
		"later": "READY=1\nSTATUS=upgrade queued",
	} {
		t.Run(asks, func(t *testing.T) {
			m := startedByManager(t)
			upg, s := NewParent(t, tableflip.Options{}, "upgrade-early", proctest.WithArg(asks))
			Upgrade(t, upg)
			child := s.Await("upgraded")
			m.want(os.Getpid(), "READY=1", reloading)
			// The child may be faster than the parent.
			var fromChild, fromParent []string
			for range 4 {
				n := m.next()
				if n.PID == child.PID {
					fromChild = append(fromChild, n.Text)
				} else {
					fromParent = append(fromParent, n.Text)
				}
			}
			if want := []string{reloading, answer}; !slices.Equal(fromChild, want) {
				t.Errorf("the child told systemd %q, want %q", fromChild, want)
			}
			if want := []string{mainPID(child.PID), barrier}; !slices.Equal(fromParent, want) {
				t.Errorf("the parent told systemd %q, want %q", fromParent, want)
			}
			s.AwaitEnd()
			m.wantNoMore()
		})
	}
}

func init() {
	proctest.Role("upgrade-early", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		ctx := context.Background()
		if proctest.Arg() == "later" {
			ctx = queue.Keeping(ctx) // as who asks again later does
		}
		proctest.Report("upgraded", upg.UpgradeContext(ctx))
	})
}

// One line of valid UTF-8 without control characters, or systemd ignores it, or
// takes part of it for something else.
func TestManagerStatusText(t *testing.T) {
	for _, test := range []struct {
		name  string
		cause string
	}{
		{"lines", "two\nlines\r\nMAINPID=1\rMAINPID=1"},
		{"NUL", "a\x00b"},
		{"invalid UTF-8", "caf\xe9 \xff\xfe \xe2\x82"},
		{"10 KB", strings.Repeat("x", 10<<10)},
		{"10 KB of ü", "x" + strings.Repeat("ü", 5<<10)},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := startedByManager(t)
			upg, _ := NewParent(t, tableflip.Options{}, "hang")
			proctest.OK(t, upg.Ready())
			ctx, cancel := context.WithCancelCause(context.Background())
			cancel(errors.New(test.cause))
			if err := upg.UpgradeContext(ctx); err == nil {
				t.Fatal("the upgrade succeeded")
			}
			m.want(os.Getpid(), "READY=1", reloading)
			text := m.next().Text
			status, found := strings.CutPrefix(text, "READY=1\nSTATUS=upgrade failed: tableflip: upgrade cancelled: ")
			if !found || len(status) < 3 || !utf8.ValidString(text) || len(text) > 1100 || strings.ContainsFunc(status, unicode.IsControl) {
				t.Errorf("%d bytes: %q", len(text), text)
			}
			if strings.HasPrefix(test.name, "10 KB") && strings.ContainsRune(text, utf8.RuneError) {
				t.Error("the status was cut within a character")
			}
		})
	}
}

func TestManagerStop(t *testing.T) {
	for _, test := range []struct {
		name     string
		ready    bool
		upgrades bool // to a child that hangs
		messages []string
	}{
		{name: "before Ready"},
		{name: "after Ready", ready: true, messages: []string{"READY=1", "STOPPING=1"}},
		{name: "during an upgrade", ready: true, upgrades: true,
			messages: []string{"READY=1", reloading, failed(tableflip.ErrStopped), "STOPPING=1"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := startedByManager(t)
			upg, s := NewParent(t, tableflip.Options{}, "hang")
			if test.ready {
				proctest.OK(t, upg.Ready())
			}
			if test.upgrades {
				result := proctest.InBackground(upg.Upgrade)
				s.Await("hanging")
				defer proctest.Within(t, "Upgrade", result)
			}
			upg.Stop()
			m.want(os.Getpid(), test.messages...)
			m.wantNoMore()
		})
	}
}

// Only the process in charge may say that the service stops.
func TestManagerChildStops(t *testing.T) {
	m := startedByManager(t)
	upg, s := NewParent(t, tableflip.Options{DescriptorStore: true}, "give-up", proctest.WithArg("tcp localhost:0"))
	proctest.OK(t, proctest.ErrorOf(upg.Listen("tcp", "localhost:0")))
	name := storeName("listener", "tcp", "localhost:0")
	proctest.OK(t, upg.Ready())
	m.want(os.Getpid(), "READY=1", storing(name))
	err := upg.Upgrade()
	s.Await("stopped")
	m.want(os.Getpid(), reloading, failed(err))
	m.wantNoMore()
}

func init() {
	proctest.Role("give-up", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{DescriptorStore: true}))
		network, addr, _ := strings.Cut(proctest.Arg(), " ")
		proctest.Must(upg.Listen(network, addr))
		upg.Stop()
		proctest.Report("stopped")
		os.Exit(7)
	})
}

// Whichever of the two wins, the messages to systemd are consistent.
func TestManagerStopCommit(t *testing.T) {
	for range 10 {
		m := startedByManager(t)
		upg, s := NewParent(t, tableflip.Options{}, "hold-socket", proctest.WithArg(filepath.Join(proctest.SocketDir(t), "s")))
		proctest.OK(t, upg.Ready())
		var stopping sync.WaitGroup
		restore := proctest.During(t, step.ReadyReceived, func() { stopping.Go(upg.Stop) })
		err := upg.Upgrade()
		restore()
		proctest.Within(t, "Stop", proctest.Waited(&stopping))
		m.want(os.Getpid(), "READY=1", reloading)
		if err != nil {
			m.want(os.Getpid(), failed(err), "STOPPING=1")
		} else if n := m.next(); !strings.HasPrefix(n.Text, "MAINPID=") {
			t.Errorf("after the upgrade systemd was told %q", n.Text)
		} else {
			m.want(os.Getpid(), barrier)
		}
		s.AwaitEnd()
		m.wantNoMore()
	}
}

// Each generation tells who comes after it. The last one stops.
func TestManagerChain(t *testing.T) {
	t.Parallel()
	m := newManager(t)
	c, g, _ := startChain(t, m.variable())
	m.want(g.PID, "READY=1")
	wantGoroutines := g.CountGoroutines(0)
	var wantFiles map[string]int
	for i := range 50 {
		next := c.upgrade(g)
		m.want(g.PID, reloading, mainPID(next.PID), barrier)
		g = next
		if got := g.CountGoroutines(wantGoroutines); got != wantGoroutines {
			t.Fatalf("generation %d has %d goroutines, want %d", i, got, wantGoroutines)
		}
		files := proctest.KindsOf(proctest.OpenFiles(t, g.PID))
		if i == 0 {
			wantFiles = files
		} else if !maps.Equal(files, wantFiles) {
			t.Fatalf("generation %d has the descriptors %v, the first child had %v", i, files, wantFiles)
		}
	}
	c.wantStop(g)
	m.want(g.PID, "STOPPING=1")
	m.wantNoMore()
}

// The manager may listen to all processes of the unit (NotifyAccess=all). If it
// does, an orphan is the service.
func TestManagerOrphan(t *testing.T) {
	t.Parallel()
	for _, at := range []step.Step{step.ChildStarted, step.BeforeCommit, step.AfterCommit} {
		m := newManager(t)
		c := newChain(t)
		parent, reaped := c.start(m.variable(), c.DieAt(at))
		parent.AwaitStep(alone)
		parent.Order("upgrade")
		child := c.Next()
		<-reaped
		child.AwaitStep(alone)
		m.want(parent.PID, "READY=1", reloading)
		m.want(child.PID, mainPID(child.PID))
		next := c.upgrade(child)
		m.want(child.PID, reloading, mainPID(next.PID), barrier)
		c.wantStop(next)
		m.want(next.PID, "STOPPING=1")
		m.wantNoMore()
	}
}

// A child that has stopped is not the service any more when its parent dies.
func TestManagerOrphanStopped(t *testing.T) {
	t.Parallel()
	m := newManager(t)
	c := newChain(t)
	parent, reaped := c.start(m.variable(), maxDrainingVariable+"=1", c.PauseAt(step.AcknowledgementReceived))
	parent.Order("upgrade")
	parent.AwaitStep(step.AcknowledgementReceived)
	child := c.Next()
	child.AwaitStep(readyReturns)
	proctest.Suspend(t, parent.PID) // or it could be the one that accepts
	held := proctest.Opened[net.Conn](t)(net.Dial("tcp", c.tcp))
	proctest.Must(io.WriteString(held, "wh")) // so that the child stays
	c.wantAnswers(c.send(), child.PID)
	child.Order("stop")
	child.Await("stopped")
	proctest.Kill(t, parent.PID, syscall.SIGKILL)
	<-reaped
	proctest.AwaitThat(t, "the child knows that the parent has ended", func() bool {
		child.Order("look")
		return child.Await("look").Text == fmt.Sprintf("2 %d draining, exit", child.PID)
	})
	m.want(parent.PID, "READY=1", reloading)
	m.want(child.PID, "STOPPING=1")
	m.wantNoMore()
}

// WATCHDOG_PID that names the parent would tell the child that its watchdog is
// another's.
func TestManagerWatchdog(t *testing.T) {
	for _, test := range []struct{ name, pid, want string }{
		{"the parent's", strconv.Itoa(os.Getpid()), "30000000"},
		{"another's", "1", "1 30000000"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("WATCHDOG_PID", test.pid)
			t.Setenv("WATCHDOG_USEC", "30000000")
			upg, s := NewParent(t, tableflip.Options{}, "tell-watchdog")
			Upgrade(t, upg)
			if got := s.Await("watchdog").Text; got != test.want {
				t.Errorf("the child has WATCHDOG_PID and WATCHDOG_USEC %q, want %q", got, test.want)
			}
		})
	}
}

func init() {
	proctest.Role("tell-watchdog", func() {
		MustBeReady(proctest.Must(tableflip.New(tableflip.Options{})))
		proctest.Report("watchdog", strings.TrimSpace(os.Getenv("WATCHDOG_PID")+" "+os.Getenv("WATCHDOG_USEC")))
	})
}

func TestManagerLeaks(t *testing.T) {
	m := startedByManager(t)
	proctest.WithoutGC(t)
	upg, _ := NewParent(t, tableflip.Options{DescriptorStore: true, Command: proctest.Unstartable}, "fail")
	proctest.OK(t, upg.Ready())
	m.want(os.Getpid(), "READY=1")
	open := 0
	for i := range 51 {
		if i == 1 { // what is opened once is open now
			open = proctest.OpenDescriptors()
		}
		ln, err := upg.Listen("tcp", "127.0.0.1:0")
		proctest.OK(t, err)
		proctest.OK(t, upg.RemoveListener("tcp", "127.0.0.1:0"))
		ln.Close()
		err = upg.Upgrade()
		name := storeName("listener", "tcp", "127.0.0.1:0")
		m.want(os.Getpid(), storing(name), removing(name), reloading, failed(err))
	}
	if now := proctest.OpenDescriptors(); now != open {
		t.Errorf("%d descriptors were open, and %d are", open, now)
	}
}
