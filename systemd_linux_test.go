package tableflip_test

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
	"example.com/tableflip/internal/step"
)

// What systemd is told, by whom and in which order, and what a systemd that does
// not play its part does to an upgrade: nothing.

// A systemd stands for the service manager. It reads what it is told, and answers
// barriers, at once.
type systemd struct {
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
	pid  int
	text string
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

// bindSystemd makes the socket of a systemd that reads nothing.
func bindSystemd(t *testing.T) *systemd {
	t.Helper()
	m := &systemd{t: t, socket: filepath.Join(socketDir(t), "notify"), started: monotonic()}
	m.bind()
	return m
}

func (m *systemd) bind() {
	m.t.Helper()
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		controlErr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
		})
		return errors.Join(controlErr, err)
	}}
	conn := opened[net.PacketConn](m.t)(config.ListenPacket(context.Background(), "unixgram", m.socket))
	m.conn = conn.(*net.UnixConn)
}

// newSystemd is for tests whose processes it has started: the first generation's
// environment must have m.variable.
func newSystemd(t *testing.T) *systemd {
	t.Helper()
	m := bindSystemd(t)
	m.read()
	return m
}

// startedBySystemd is for tests that are the first generation themselves.
func startedBySystemd(t *testing.T) *systemd {
	t.Helper()
	m := newSystemd(t)
	t.Setenv("NOTIFY_SOCKET", m.socket)
	return m
}

func (m *systemd) variable() string { return "NOTIFY_SOCKET=" + m.socket }

func monotonic() time.Duration {
	var now unix.Timespec
	must(0, unix.ClockGettime(unix.CLOCK_MONOTONIC, &now))
	return time.Duration(now.Nano())
}

func (m *systemd) read() {
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

func (m *systemd) receive() (notification, error) {
	buffer, control := make([]byte, 4096), make([]byte, 256)
	length, controlLength, _, _, err := m.conn.ReadMsgUnix(buffer, control)
	if err != nil {
		return notification{}, err
	}
	n := notification{text: string(buffer[:length])}
	for _, c := range must(unix.ParseSocketControlMessage(control[:controlLength])) {
		if credentials, err := unix.ParseUnixCredentials(&c); err == nil {
			n.pid = int(credentials.Pid)
		}
		if fds, err := unix.ParseUnixRights(&c); err == nil {
			n.file = os.NewFile(uintptr(fds[0]), "passed")
		}
	}
	if n.text == barrier && !m.lazy.Load() {
		n.file.Close()
	}
	if before, usec, found := strings.Cut(n.text, "MONOTONIC_USEC="); found {
		at, err := strconv.ParseInt(usec, 10, 64)
		if d := time.Duration(at) * time.Microsecond; err == nil && d >= m.started.Truncate(time.Microsecond) && d <= monotonic() {
			n.text = before + "MONOTONIC_USEC=now"
		}
	}
	return n, nil
}

// next returns the next message, whatever it is, and does what it says to the
// descriptor store.
func (m *systemd) next() notification {
	m.t.Helper()
	n := within(m.t, "a message to systemd", m.messages)
	_, name, _ := strings.Cut(n.text, "FDNAME=")
	name, _, _ = strings.Cut(name, "\n")
	switch {
	case strings.HasPrefix(n.text, "FDSTORE=1\n"):
		m.store = append(m.store, stored{name, n.file})
	case strings.HasPrefix(n.text, "FDSTOREREMOVE=1\n"):
		m.store = slices.DeleteFunc(m.store, func(s stored) bool {
			if s.name == name {
				s.file.Close()
			}
			return s.name == name
		})
	}
	return n
}

// expect checks that the next messages are these and come from the process pid.
func (m *systemd) expect(pid int, texts ...string) {
	m.t.Helper()
	for _, text := range texts {
		if n := m.next(); n.pid != pid || n.text != text {
			m.t.Fatalf("%d told systemd %q; want %q from %d", n.pid, n.text, text, pid)
		}
	}
}

// expectNoMore checks that systemd has been told nothing that was not expected.
func (m *systemd) expectNoMore() {
	m.t.Helper()
	m.sendLast()
	m.expect(os.Getpid(), last)
}

// sendLast queues the message last behind those that were sent before.
func (m *systemd) sendLast() {
	m.t.Helper()
	conn := opened[*net.UnixConn](m.t)(net.DialUnix("unixgram", nil, m.conn.LocalAddr().(*net.UnixAddr)))
	must(io.WriteString(conn, last))
	conn.Close()
}

// die closes the socket. What was sent and not read is gone, as are its descriptors.
func (m *systemd) die() {
	m.conn.Close()
}

// clog fills the queue, so that whoever sends more must wait.
func (m *systemd) clog() {
	m.t.Helper()
	fd := must(unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0))
	defer unix.Close(fd)
	for {
		err := unix.Sendto(fd, []byte("X_CLOG=1"), 0, &unix.SockaddrUnix{Name: m.socket})
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		require(m.t, err)
	}
}

// shorten makes a timeout short, for tests in which it passes.
func shorten(t *testing.T, timeout *time.Duration) {
	before := *timeout
	*timeout = 20 * time.Millisecond
	t.Cleanup(func() { *timeout = before })
}

// awaitLog returns the next line that says this. Others before it are dropped.
func (l logbook) await(t *testing.T, text string) string {
	t.Helper()
	for {
		if line := within(t, "the log to say "+text, l); strings.Contains(line, text) {
			return line
		}
	}
}

func TestSystemdHearsOfAnUpgrade(t *testing.T) {
	for name, prefix := range map[string]string{"file": "", "abstract": "@"} {
		t.Run(name, func(t *testing.T) {
			m := &systemd{t: t, socket: prefix + filepath.Join(socketDir(t), "notify"), started: monotonic()}
			m.bind()
			m.read()
			t.Setenv("NOTIFY_SOCKET", m.socket)
			logger, logbook := newLogger()
			upg, s := newParent(t, tableflip.Options{Logger: logger}, "succeed")
			m.expectNoMore()
			upgrade(t, upg)
			child := s.await("ready")
			s.awaitEnd()
			upg.Stop()
			m.expect(os.Getpid(), "READY=1", reloading, mainPID(child.pid), barrier)
			m.expectNoMore()
			for len(logbook) > 0 {
				if line := <-logbook; strings.Contains(line, "service manager") {
					t.Error(line)
				}
			}
		})
	}
}

// Told nothing, systemd would end the service with its old main process.
func TestSystemdHearsOfAnUpgradeThatLeftNoDescriptor(t *testing.T) {
	m := startedBySystemd(t)
	upg, s := newParent(t, tableflip.Options{}, "succeed")
	var before unix.Rlimit
	require(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &before))
	during(t, step.AfterCommit, func() {
		unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: before.Max})
	})
	ready(t, upg)
	err := upg.Upgrade()
	require(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &before))
	require(t, err)
	child := s.await("ready")
	s.awaitEnd()
	m.expect(os.Getpid(), "READY=1", reloading, mainPID(child.pid), barrier)
}

// The process that serves need not be the one that was started.
func TestSystemdHearsThePIDThatTheChildReports(t *testing.T) {
	m := startedBySystemd(t)
	var started *exec.Cmd
	upg, s := newParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
		wrap(`"$0" & wait`)(cmd)
		started = cmd
	}}, "succeed")
	upgrade(t, upg)
	child := s.await("ready")
	if child.pid == started.Process.Pid {
		t.Fatal("no wrapper was started")
	}
	m.expect(os.Getpid(), "READY=1", reloading, mainPID(child.pid), barrier)
	s.awaitEnd()
}

func TestSystemdHearsWhyAnUpgradeFailed(t *testing.T) {
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
		{name: "cancelled", role: "succeed", step: step.ReadyReceived},
		{name: "cancelled before", role: "succeed", ctx: ended},
		{name: "not startable", opts: tableflip.Options{Command: unstartable}},
		{name: "files of its own", opts: tableflip.Options{Command: func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{os.Stderr} }}},
		{name: "unreadable PID file", role: "fail", opts: tableflip.Options{PIDFile: filepath.Join(t.TempDir(), "pid")}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := startedBySystemd(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			during(t, test.step, cancel)
			if test.ctx != nil {
				ctx = test.ctx
			}
			upg, _ := newParent(t, test.opts, test.role)
			ready(t, upg)
			if test.opts.PIDFile != "" {
				require(t, os.Remove(test.opts.PIDFile))
				require(t, os.Mkdir(test.opts.PIDFile, 0o700))
			}
			err := upg.UpgradeContext(ctx)
			if err == nil {
				t.Fatal("the upgrade succeeded")
			}
			m.expect(os.Getpid(), "READY=1", reloading, failed(err))
			m.expectNoMore()
			upg.Stop()
			m.expect(os.Getpid(), "STOPPING=1")
			upg.Stop()
			m.expectNoMore()
		})
	}
}

func init() {
	roles["crash"] = func() {
		must(tableflip.New(tableflip.Options{}))
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

func TestSystemdHearsWhyAnUpgradePanicked(t *testing.T) {
	m := startedBySystemd(t)
	upg, _ := newParent(t, tableflip.Options{Command: func(*exec.Cmd) { panic("as told") }}, "succeed")
	ready(t, upg)
	func() {
		defer func() { _ = recover() }()
		upg.Upgrade()
	}()
	m.expect(os.Getpid(), "READY=1", reloading, failed(errors.New("tableflip: Options.Command has panicked")))
}

// With Type=notify-reload, every reload is answered: one that meets an upgrade, by
// the end of that.
func TestSystemdHearsOfAReloadDuringAnUpgrade(t *testing.T) {
	m := startedBySystemd(t)
	upg, s := newParent(t, tableflip.Options{}, "hang")
	ready(t, upg)
	ctx, cancel := context.WithCancel(context.Background())
	result := inBackground(func() error { return upg.UpgradeContext(ctx) })
	s.await("hanging")
	wantError(t, "the second upgrade", upg.Upgrade(), tableflip.ErrUpgradeInProgress)
	cancel()
	err := within(t, "Upgrade", result)
	m.expect(os.Getpid(), "READY=1", reloading, reloading, failed(err))
	m.expectNoMore()
}

// A reload that comes while the old process drains is answered, too, by the new one.
func TestSystemdHearsOfAReloadWhileTheParentDrains(t *testing.T) {
	m := startedBySystemd(t)
	upg, s := newParent(t, tableflip.Options{}, "upgrade-early")
	upgrade(t, upg)
	child := s.await("upgraded")
	m.expect(os.Getpid(), "READY=1", reloading)
	// The child may be faster than the parent.
	var fromChild, fromParent []string
	for range 4 {
		n := m.next()
		if n.pid == child.pid {
			fromChild = append(fromChild, n.text)
		} else {
			fromParent = append(fromParent, n.text)
		}
	}
	if want := []string{reloading, failed(tableflip.ErrParentRunning)}; !slices.Equal(fromChild, want) {
		t.Errorf("the child told systemd %q, want %q", fromChild, want)
	}
	if want := []string{mainPID(child.pid), barrier}; !slices.Equal(fromParent, want) {
		t.Errorf("the parent told systemd %q, want %q", fromParent, want)
	}
	s.awaitEnd()
	m.expectNoMore()
}

func init() {
	roles["upgrade-early"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		mustBeReady(upg)
		report("upgraded", upg.Upgrade())
	}
}

// One line of valid UTF-8 without control characters, or systemd ignores it, or
// takes part of it for something else.
func TestSystemdCanReadWhyAnUpgradeFailed(t *testing.T) {
	for name, cause := range map[string]string{
		"lines":         "two\nlines\r\nMAINPID=1\rMAINPID=1",
		"NUL":           "a\x00b",
		"invalid UTF-8": "caf\xe9 \xff\xfe \xe2\x82",
		"10 KB":         strings.Repeat("x", 10<<10),
		"10 KB of ü":    "x" + strings.Repeat("ü", 5<<10),
	} {
		t.Run(name, func(t *testing.T) {
			m := startedBySystemd(t)
			upg, _ := newParent(t, tableflip.Options{}, "hang")
			ready(t, upg)
			ctx, cancel := context.WithCancelCause(context.Background())
			cancel(errors.New(cause))
			if err := upg.UpgradeContext(ctx); err == nil {
				t.Fatal("the upgrade succeeded")
			}
			m.expect(os.Getpid(), "READY=1", reloading)
			text := m.next().text
			status, found := strings.CutPrefix(text, "READY=1\nSTATUS=upgrade failed: tableflip: upgrade cancelled: ")
			if !found || len(status) < 3 || !utf8.ValidString(text) || len(text) > 1100 || strings.ContainsFunc(status, unicode.IsControl) {
				t.Errorf("%d bytes: %q", len(text), text)
			}
			if strings.HasPrefix(name, "10 KB") && strings.ContainsRune(text, utf8.RuneError) {
				t.Error("the status was cut within a character")
			}
		})
	}
}

func TestSystemdHearsOfStop(t *testing.T) {
	for _, test := range []struct {
		name     string
		role     string // of the child of an upgrade
		ready    bool
		messages []string
	}{
		{name: "before Ready"},
		{name: "after Ready", ready: true, messages: []string{"READY=1", "STOPPING=1"}},
		{name: "during an upgrade", ready: true, role: "hang",
			messages: []string{"READY=1", reloading, failed(tableflip.ErrStopped), "STOPPING=1"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := startedBySystemd(t)
			upg, s := newParent(t, tableflip.Options{}, test.role)
			if test.ready {
				ready(t, upg)
			}
			if test.role != "" {
				result := inBackground(upg.Upgrade)
				s.await("hanging")
				defer within(t, "Upgrade", result)
			}
			upg.Stop()
			m.expect(os.Getpid(), test.messages...)
			m.expectNoMore()
		})
	}
}

// Nobody but its parent is to say that the service stops.
func TestSystemdHearsNothingFromAChildThatNeverGotInCharge(t *testing.T) {
	m := startedBySystemd(t)
	upg, s := newParent(t, tableflip.Options{DescriptorStore: true}, "give-up", withArg("tcp localhost:0"))
	require(t, listens(upg.Listen("tcp", "localhost:0")))
	name := tableflip.StoreName("listener", "tcp", "localhost:0")
	ready(t, upg)
	m.expect(os.Getpid(), "READY=1", storing(name))
	err := upg.Upgrade()
	s.await("stopped")
	m.expect(os.Getpid(), reloading, failed(err))
	m.expectNoMore()
}

func init() {
	roles["give-up"] = func() {
		upg := must(tableflip.New(tableflip.Options{DescriptorStore: true}))
		network, addr, _ := strings.Cut(arg(), " ")
		must(upg.Listen(network, addr))
		upg.Stop()
		report("stopped")
		os.Exit(7)
	}
}

// Whoever wins, systemd hears a story that makes sense.
func TestSystemdHearsOneStoryIfStopMeetsTheCommit(t *testing.T) {
	for range 10 {
		m := startedBySystemd(t)
		upg, s := newParent(t, tableflip.Options{}, "hold-socket", withArg(filepath.Join(socketDir(t), "s")))
		ready(t, upg)
		var stopping sync.WaitGroup
		restore := when(step.ReadyReceived, func() { stopping.Go(upg.Stop) })
		err := upg.Upgrade()
		restore()
		within(t, "Stop", waited(&stopping))
		m.expect(os.Getpid(), "READY=1", reloading)
		if err != nil {
			m.expect(os.Getpid(), failed(err), "STOPPING=1")
		} else if n := m.next(); !strings.HasPrefix(n.text, "MAINPID=") {
			t.Errorf("after the upgrade systemd was told %q", n.text)
		} else {
			m.expect(os.Getpid(), barrier)
		}
		s.awaitEnd()
		m.expectNoMore()
	}
}

// Each generation tells who comes after it. The last one stops.
func TestSystemdFollowsFiftyGenerations(t *testing.T) {
	t.Parallel()
	m := newSystemd(t)
	c, g, _ := startChain(t, m.variable())
	m.expect(g.pid, "READY=1")
	wantGoroutines := g.countGoroutines(0)
	var wantFiles map[string]int
	for i := range 50 {
		next := c.upgrade(g)
		m.expect(g.pid, reloading, mainPID(next.pid), barrier)
		g = next
		if got := g.countGoroutines(wantGoroutines); got != wantGoroutines {
			t.Fatalf("generation %d has %d goroutines, want %d", i, got, wantGoroutines)
		}
		files := kindsOf(openFiles(t, g.pid))
		if i == 0 {
			wantFiles = files
		} else if !maps.Equal(files, wantFiles) {
			t.Fatalf("generation %d has the descriptors %v, the first child had %v", i, files, wantFiles)
		}
	}
	c.expectStop(g)
	m.expect(g.pid, "STOPPING=1")
	m.expectNoMore()
}

// The manager may listen to all processes of the unit (NotifyAccess=all). If it
// does, an orphan is the service.
func TestSystemdHearsOfAnOrphan(t *testing.T) {
	t.Parallel()
	for _, at := range []step.Step{step.ChildStarted, step.BeforeCommit, step.AfterCommit} {
		m := newSystemd(t)
		c, parent, reaped := startChain(t, m.variable(), faultVariable+"="+at.String())
		parent.order("upgrade")
		child := c.next()
		<-reaped
		child.await("alone")
		m.expect(parent.pid, "READY=1", reloading)
		m.expect(child.pid, fmt.Sprintf("MAINPID=%d\nREADY=1", child.pid))
		next := c.upgrade(child)
		m.expect(child.pid, reloading, mainPID(next.pid), barrier)
		c.expectStop(next)
		m.expect(next.pid, "STOPPING=1")
		m.expectNoMore()
	}
}

// systemd must know the new main process while the old one is there.
func TestOldProcessWaitsForSystemd(t *testing.T) {
	m := startedBySystemd(t)
	m.lazy.Store(true)
	upg, s := newParent(t, tableflip.Options{}, "answer")
	ln := opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	ready(t, upg)
	result := inBackground(upg.Upgrade)
	child := s.await("ready")
	m.expect(os.Getpid(), "READY=1", reloading, mainPID(child.pid))
	n := m.next()
	if n.text != barrier || n.file == nil {
		t.Fatalf("systemd was told %q, with %v", n.text, n.file)
	}
	// Meanwhile the child serves.
	if got := answerOf(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.pid) {
		t.Errorf("the answer is %q, want %d", got, child.pid)
	}
	s.awaitEnd()
	if isClosed(upg.Exit()) || isClosed(result) {
		t.Error("the old process may exit before systemd knows the new one")
	}
	n.file.Close()
	require(t, within(t, "Upgrade", result))
	if !isClosed(upg.Exit()) {
		t.Error("Exit is open after the upgrade")
	}
	m.expectNoMore()
}

func TestOldProcessWaitsForSystemdNotForEver(t *testing.T) {
	shorten(t, tableflip.BarrierTimeout)
	m := startedBySystemd(t)
	m.lazy.Store(true)
	logger, logbook := newLogger()
	upg, s := newParent(t, tableflip.Options{Logger: logger}, "succeed")
	var committed time.Time
	during(t, step.AfterCommit, func() { committed = time.Now() })
	upgrade(t, upg)
	if waited := time.Since(committed); waited < *tableflip.BarrierTimeout {
		t.Errorf("Upgrade returned %v after the commit", waited)
	}
	line := logbook.await(t, fmt.Sprintf("the new main process, %d", s.await("ready").pid))
	if !strings.Contains(line, "i/o timeout") {
		t.Errorf("the log says %s", line)
	}
	for range 3 {
		m.next()
	}
	if n := m.next(); n.text != barrier {
		t.Errorf("systemd was told %q", n.text)
	} else {
		n.file.Close()
	}
}

// What does not reach systemd fails no upgrade, and is logged.
func TestUpgradeNeedsNoSystemd(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, m *systemd){
		"no such socket": func(t *testing.T, m *systemd) { require(t, os.Remove(m.socket)) },
		"refused":        func(t *testing.T, m *systemd) { m.die() },
		"too long a path": func(t *testing.T, m *systemd) {
			t.Setenv("NOTIFY_SOCKET", "/"+strings.Repeat("x", 200))
		},
		"a file": func(t *testing.T, m *systemd) {
			require(t, os.Remove(m.socket))
			require(t, os.WriteFile(m.socket, nil, 0o600))
		},
		"dead at the start of the child": func(t *testing.T, m *systemd) { during(t, step.ChildStarted, m.die) },
		"dead when the child is ready":   func(t *testing.T, m *systemd) { during(t, step.ReadyReceived, m.die) },
		"dead before the commit":         func(t *testing.T, m *systemd) { during(t, step.BeforeCommit, m.die) },
		"dead after the commit":          func(t *testing.T, m *systemd) { during(t, step.AfterCommit, m.die) },
	} {
		t.Run(name, func(t *testing.T) {
			m := startedBySystemd(t)
			spoil(t, m)
			logger, logbook := newLogger()
			upg, s := newParent(t, tableflip.Options{Logger: logger, DescriptorStore: true}, "succeed")
			require(t, listens(upg.Listen("tcp", "localhost:0")))
			upgrade(t, upg)
			s.await("ready")
			if !isClosed(upg.Exit()) {
				t.Error("Exit is open after the upgrade")
			}
			upg.Stop()
			logbook.await(t, "can't talk to the service manager")
		})
	}
}

func TestUnusableNotifySocketIsLoggedOnce(t *testing.T) {
	for _, socket := range []string{"vsock:2:1234", "notify"} {
		t.Run(socket, func(t *testing.T) {
			t.Setenv("NOTIFY_SOCKET", socket)
			logger, logbook := newLogger()
			upg, _ := newParent(t, tableflip.Options{Logger: logger}, "succeed")
			logbook.await(t, "NOTIFY_SOCKET is "+`\"`+socket)
			upgrade(t, upg)
			upg.Stop()
			for len(logbook) > 0 {
				if line := <-logbook; strings.Contains(line, "service manager") {
					t.Errorf("and again: %s", line)
				}
			}
		})
	}
}

// A systemd that dies closes the barrier's descriptor, read or not.
func TestDeadSystemdDoesNotKeepTheOldProcess(t *testing.T) {
	m := bindSystemd(t)
	t.Setenv("NOTIFY_SOCKET", m.socket)
	upg, _ := newParent(t, tableflip.Options{}, "succeed")
	ready(t, upg)
	result := inBackground(upg.Upgrade)
	for range 3 { // READY, RELOADING, MAINPID
		must(m.receive())
	}
	m.awaitQueue()
	m.die()
	require(t, within(t, "Upgrade", result))
}

// awaitQueue waits until there is something to read.
func (m *systemd) awaitQueue() {
	m.t.Helper()
	require(m.t, must(m.conn.SyscallConn()).Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK)
		return !errors.Is(err, unix.EAGAIN)
	}))
}

func TestCloggedSystemdDelaysAndFailsNothing(t *testing.T) {
	shorten(t, tableflip.NotifyTimeout)
	m := bindSystemd(t)
	t.Setenv("NOTIFY_SOCKET", m.socket)
	m.clog()
	logger, logbook := newLogger()
	upg, s := newParent(t, tableflip.Options{Logger: logger, DescriptorStore: true}, "tell-table")
	const sockets = 20
	for range sockets {
		require(t, listens(upg.Listen("tcp", "localhost:0")))
	}
	upgrade(t, upg)
	table := s.await("table").text

	// READY, RELOADING, MAINPID, and the first socket of the store waited.
	waits, refused := 0, 0
	for len(logbook) > 0 {
		switch line := <-logbook; {
		case strings.Contains(line, "i/o timeout"):
			waits++
		case strings.Contains(line, "did not read what it was sent before"):
			refused++
		}
	}
	if waits != 4 || refused != sockets-1 {
		t.Errorf("waited %d times, and did not %d times", waits, refused)
	}
	if strings.Contains(table, "tableflip%2C") {
		t.Errorf("the child was told that something is stored: %s", table)
	}
}

func init() {
	roles["tell-table"] = func() {
		report("table", handoverVariables())
		mustBeReady(must(tableflip.New(tableflip.Options{})))
	}
}

// WATCHDOG_PID that names the parent would tell the child that its watchdog is
// another's.
func TestChildInheritsTheWatchdog(t *testing.T) {
	for name, test := range map[string]struct{ pid, want string }{
		"the parent's": {strconv.Itoa(os.Getpid()), "30000000"},
		"another's":    {"1", "1 30000000"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("WATCHDOG_PID", test.pid)
			t.Setenv("WATCHDOG_USEC", "30000000")
			upg, s := newParent(t, tableflip.Options{}, "tell-watchdog")
			upgrade(t, upg)
			if got := s.await("watchdog").text; got != test.want {
				t.Errorf("the child has WATCHDOG_PID and WATCHDOG_USEC %q, want %q", got, test.want)
			}
		})
	}
}

func init() {
	roles["tell-watchdog"] = func() {
		mustBeReady(must(tableflip.New(tableflip.Options{})))
		report("watchdog", strings.TrimSpace(os.Getenv("WATCHDOG_PID")+" "+os.Getenv("WATCHDOG_USEC")))
	}
}

func TestTalkingToSystemdLeaksNothing(t *testing.T) {
	m := startedBySystemd(t)
	withoutGC(t)
	upg, _ := newParent(t, tableflip.Options{DescriptorStore: true, Command: unstartable}, "")
	ready(t, upg)
	m.expect(os.Getpid(), "READY=1")
	open := 0
	for i := range 51 {
		if i == 1 { // what is opened once is open now
			open = openDescriptors()
		}
		ln, err := upg.Listen("tcp", "127.0.0.1:0")
		require(t, err)
		require(t, upg.RemoveListener("tcp", "127.0.0.1:0"))
		ln.Close()
		err = upg.Upgrade()
		name := tableflip.StoreName("listener", "tcp", "127.0.0.1:0")
		m.expect(os.Getpid(), storing(name), removing(name), reloading, failed(err))
	}
	if now := openDescriptors(); now != open {
		t.Errorf("%d descriptors were open, and %d are", open, now)
	}
}

// The descriptor store

// storeNames returns the names of what is in the store, in order.
func (m *systemd) storeNames() []string {
	var names []string
	for _, s := range m.store {
		names = append(names, s.name)
	}
	slices.Sort(names)
	return names
}

// restart starts a first generation with what is in the store.
func (m *systemd) restart(cmd *exec.Cmd) {
	m.t.Helper()
	var names []string
	var files []*os.File
	for _, s := range m.store {
		names = append(names, s.name)
		files = append(files, s.file)
	}
	activate(m.t, cmd, files, named(names...))
}

// expectStored checks that the next message stores a copy of socket.
func (m *systemd) expectStored(name string, socket syscall.Conn) {
	m.t.Helper()
	m.expect(os.Getpid(), storing(name))
	if s := m.store[len(m.store)-1]; !sameSocket(m.t, s.file, socket) {
		m.t.Errorf("%s is another socket", name)
	}
}

func TestStoreHasACopyOfEachSocket(t *testing.T) {
	m := startedBySystemd(t)
	path := filepath.Join(socketDir(t), "s:ä")
	logger, logbook := newLogger()
	upg := newUpgrader(t, tableflip.Options{DescriptorStore: true, Logger: logger})
	tcp := opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	namesake := opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	udp := opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0"))
	server, _ := connect(t)
	require(t, upg.AddFile("file", opened[*os.File](t)(os.Open(os.DevNull))))
	require(t, upg.AddConn("tcp", "conn", server))
	// It would need more than 255 characters.
	require(t, upg.AddListener("tcp", strings.Repeat("ä", 50), tcp.(tableflip.Listener)))
	m.expectNoMore() // before Ready
	ready(t, upg)
	m.expect(os.Getpid(), "READY=1")
	tcpName := tableflip.StoreName("listener", "tcp", "localhost:0")
	udpName := tableflip.StoreName("packet", "udp", "localhost:0")
	m.expectStored(tcpName, tcp.(syscall.Conn))
	m.expectStored(tcpName, namesake.(syscall.Conn))
	m.expectStored(udpName, udp.(syscall.Conn))
	m.expectNoMore()
	logbook.await(t, "its name is too long")

	// What comes later is stored at once.
	local := opened[net.Listener](t)(upg.Listen("unix", path))
	localName := tableflip.StoreName("listener", "unix", path)
	m.expectStored(localName, local.(syscall.Conn))

	// Removing goes by name: a namesake is stored again.
	require(t, upg.RemoveListener("tcp", "localhost:0"))
	m.expect(os.Getpid(), removing(tcpName))
	m.expectStored(tcpName, namesake.(syscall.Conn))
	require(t, upg.RemovePacketConn("udp", "localhost:0"))
	m.expect(os.Getpid(), removing(udpName))
	require(t, upg.RemoveListener("tcp", strings.Repeat("ä", 50)))
	m.expectNoMore()

	// What is replaced is removed before its successor is stored.
	successor := opened[net.Listener](t)(net.Listen("tcp", "localhost:0"))
	require(t, upg.AddListener("unix", path, successor.(tableflip.Listener)))
	m.expect(os.Getpid(), removing(localName))
	m.expectStored(localName, successor.(syscall.Conn))

	upg.Stop()
	m.expect(os.Getpid(), "STOPPING=1", removing(tcpName), removing(localName))
	m.expectNoMore()
	if len(m.store) > 0 {
		t.Errorf("left in the store: %q", m.storeNames())
	}
}

func TestNothingIsStoredUnasked(t *testing.T) {
	m := startedBySystemd(t)
	upg := newUpgrader(t, tableflip.Options{})
	require(t, listens(upg.Listen("tcp", "localhost:0")))
	ready(t, upg)
	require(t, upg.RemoveListener("tcp", "localhost:0"))
	upg.Stop()
	m.expect(os.Getpid(), "READY=1", "STOPPING=1")
	m.expectNoMore()
}

// A Listen that meets Stop leaves no copy in the store.
func TestStopAndListenLeaveNothingInTheStore(t *testing.T) {
	for range 20 {
		m := startedBySystemd(t)
		upg := newUpgrader(t, tableflip.Options{DescriptorStore: true})
		ready(t, upg)
		var listening sync.WaitGroup
		for range 4 {
			listening.Go(func() {
				if ln, err := upg.Listen("tcp", "127.0.0.1:0"); err == nil {
					ln.Close()
				}
			})
		}
		upg.Stop()
		within(t, "Listen", waited(&listening))
		m.sendLast()
		for m.next().text != last {
		}
		if len(m.store) > 0 {
			t.Fatalf("left in the store: %q", m.storeNames())
		}
	}
}

// Connections wait in the queues while nobody is there.
func TestStoreOutlivesACrash(t *testing.T) {
	m := newSystemd(t)
	dir := socketDir(t)
	path := filepath.Join(dir, "s")
	sockets := []string{"tcp localhost:0", "tcp localhost:0", "unix " + path, "udp localhost:0"}
	s, first := startService(t, "keep", m.variable(), withArg(strings.Join(sockets, "\n")))
	addrs := strings.Fields(s.await("ready").text)
	m.expect(first.Process.Pid, "READY=1")
	for _, socket := range sockets {
		m.expect(first.Process.Pid, storing(storeNameOf(socket)))
	}
	var waiting []net.Conn
	for i, socket := range sockets {
		network, _, _ := strings.Cut(socket, " ")
		conn := opened[net.Conn](t)(net.Dial(network, addrs[i]))
		must(io.WriteString(conn, "x"))
		waiting = append(waiting, conn)
	}
	require(t, first.Process.Kill())
	s.awaitEnd()

	// Nothing is changed by one that fails to start.
	s = newService(t)
	m.restart(s.command("give-up", m.variable(), withArg("unix "+path)))
	s.await("stopped")
	s.awaitEnd()
	m.expectNoMore()
	if !exists(path) {
		t.Error("the socket's file is gone")
	}

	// More than the service asks for: the last is no more.
	s = newService(t)
	m.restart(s.command("keep", m.variable(), withArg(strings.Join(sockets[:3], "\n"))))
	again := s.await("ready")
	if want := strings.Join(addrs[:3], " "); again.text != want {
		t.Errorf("after the crash it listens on %s, want %s", again.text, want)
	}
	for _, conn := range waiting[:3] {
		conn.SetDeadline(time.Now().Add(patience))
		if answer, err := io.ReadAll(conn); string(answer) != strconv.Itoa(again.pid) {
			t.Errorf("%v: the answer is %q, %v, want %d", conn.RemoteAddr(), answer, err, again.pid)
		}
	}
	m.expect(again.pid, "READY=1", removing(storeNameOf(sockets[3])))
	m.expectNoMore()
	terminate(t, again.pid)
	s.awaitEnd()
	m.expect(again.pid, "STOPPING=1", removing(storeNameOf(sockets[0])), removing(storeNameOf(sockets[2])))
	m.expectNoMore()
	if exists(path) {
		t.Error("Stop has left the socket's file")
	}
}

// Until its parent has exited, systemd does not listen to a child.
func TestChildStoresOnceItsParentHasExited(t *testing.T) {
	for _, stores := range []bool{true, false} {
		t.Run(fmt.Sprint("option ", stores), func(t *testing.T) {
			m := newSystemd(t)
			const kept, dropped, added = "tcp localhost:0", "tcp 127.0.0.1:0", "udp localhost:0"
			s, parent := startService(t, "keep", m.variable(),
				withArg(strings.Join([]string{kept, dropped, "upgrade " + fmt.Sprint(stores), kept, added}, "\n")))
			s.await("ready")
			m.expect(parent.Process.Pid, "READY=1", storing(storeNameOf(kept)), storing(storeNameOf(dropped)))
			child := s.await("ready")
			m.expect(parent.Process.Pid, reloading, mainPID(child.pid), barrier)
			m.expectNoMore()
			terminate(t, parent.Process.Pid)
			if stores {
				m.expect(child.pid, removing(storeNameOf(dropped)), storing(storeNameOf(added)))
			} else {
				m.expect(child.pid, removing(storeNameOf(dropped)), removing(storeNameOf(kept)))
			}
			m.expectNoMore()
			terminate(t, child.pid)
			s.awaitEnd()
			m.expect(child.pid, "STOPPING=1")
			if stores {
				m.expect(child.pid, removing(storeNameOf(kept)), removing(storeNameOf(added)))
			}
			m.expectNoMore()
		})
	}
}

func storeNameOf(socket string) string {
	network, addr, _ := strings.Cut(socket, " ")
	kind := "listener"
	if network == "udp" {
		kind = "packet"
	}
	return tableflip.StoreName(kind, network, addr)
}

func init() {
	// keep has its sockets, NETWORK ADDRESS, stored. What follows the line upgrade
	// is for a child, with the option or without. Once it is ready it answers what a
	// connection says, and stops when it is terminated.
	roles["keep"] = func() {
		terminated := terminated()
		restarted := os.Getenv("LISTEN_FDS") != ""
		this, rest, upgrade := strings.Cut(arg(), "\nupgrade ")
		option, rest, _ := strings.Cut(rest, "\n")
		upg := must(tableflip.New(tableflip.Options{
			DescriptorStore: os.Getenv(storeVariable) != "false",
			Command: func(cmd *exec.Cmd) {
				cmd.Env = append(cmd.Env, storeVariable+"="+option, withArg(rest))
			},
		}))
		var addrs []any
		var serve []func()
		for socket := range strings.SplitSeq(this, "\n") {
			network, addr, _ := strings.Cut(socket, " ")
			if network == "udp" {
				addrs = append(addrs, must(upg.ListenPacket(network, addr)).LocalAddr())
				continue
			}
			ln := must(upg.Listen(network, addr))
			addrs = append(addrs, ln.Addr())
			serve = append(serve, func() {
				conn := must(ln.Accept())
				must(conn.Read(make([]byte, 1)))
				must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
				conn.Close()
			})
		}
		if restarted { // else it is to crash
			for _, serve := range serve {
				go serve()
			}
		}
		mustBeReady(upg)
		report("ready", addrs...)
		if upgrade {
			must(0, upg.Upgrade())
		}
		<-terminated
		upg.Stop()
	}
}

// storeVariable is "false" for a generation without Options.DescriptorStore.
const storeVariable = "TABLEFLIP_TEST_STORE"
