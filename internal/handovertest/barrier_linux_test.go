package handovertest

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/systemd"
)

// An upgrade succeeds although the service manager does not do its part.

// systemd must know the new main process before the old one exits.
func TestBarrier(t *testing.T) {
	m := startedByManager(t)
	m.lazy.Store(true)
	upg, s := NewParent(t, tableflip.Options{}, "answer")
	ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	proctest.OK(t, upg.Ready())
	result := proctest.InBackground(upg.Upgrade)
	child := s.Await("ready")
	m.want(os.Getpid(), "READY=1", reloading, mainPID(child.PID))
	n := m.next()
	if n.Text != barrier || n.file == nil {
		t.Fatalf("systemd was told %q, with %v", n.Text, n.file)
	}
	// Meanwhile the child serves.
	if got := proctest.Answer(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.PID) {
		t.Errorf("the answer is %q, want %d", got, child.PID)
	}
	s.AwaitEnd()
	if proctest.IsClosed(upg.Exit()) || proctest.IsClosed(result) {
		t.Error("the old process may exit before systemd knows the new one")
	}
	n.file.Close()
	proctest.OK(t, proctest.Within(t, "Upgrade", result))
	if !proctest.IsClosed(upg.Exit()) {
		t.Error("Exit is open after the upgrade")
	}
	m.wantNoMore()
}

func TestBarrierTimeout(t *testing.T) {
	shorten(t, &systemd.BarrierTimeout)
	m := startedByManager(t)
	m.lazy.Store(true)
	logger, logbook := proctest.NewLogger()
	upg, s := NewParent(t, tableflip.Options{Logger: logger}, "succeed")
	var committed time.Time
	proctest.During(t, step.AfterCommit, func() { committed = time.Now() })
	Upgrade(t, upg)
	if waited := time.Since(committed); waited < systemd.BarrierTimeout {
		t.Errorf("Upgrade returned %v after the commit", waited)
	}
	line := logbook.Await(t, fmt.Sprintf("the new main process, %d", s.Await("ready").PID))
	if !strings.Contains(line, "i/o timeout") {
		t.Errorf("the log says %s", line)
	}
	for range 3 {
		m.next()
	}
	if n := m.next(); n.Text != barrier {
		t.Errorf("systemd was told %q", n.Text)
	} else {
		n.file.Close()
	}
}

// A systemd that dies closes the barrier's descriptor, read or not.
func TestBarrierManagerDies(t *testing.T) {
	m := bindManager(t)
	t.Setenv("NOTIFY_SOCKET", m.socket)
	upg, _ := NewParent(t, tableflip.Options{}, "succeed")
	proctest.OK(t, upg.Ready())
	result := proctest.InBackground(upg.Upgrade)
	for range 3 { // READY, RELOADING, MAINPID
		proctest.Must(m.receive())
	}
	m.awaitQueue()
	m.die()
	proctest.OK(t, proctest.Within(t, "Upgrade", result))
}

// A message that does not reach systemd is logged, and the upgrade succeeds.
func TestManagerBroken(t *testing.T) {
	for _, test := range []struct {
		name  string
		spoil func(t *testing.T, m *manager)
	}{
		{"no such socket", func(t *testing.T, m *manager) { proctest.OK(t, os.Remove(m.socket)) }},
		{"refused", func(t *testing.T, m *manager) { m.die() }},
		{"too long a path", func(t *testing.T, m *manager) {
			t.Setenv("NOTIFY_SOCKET", "/"+strings.Repeat("x", 200))
		}},
		{"a file", func(t *testing.T, m *manager) {
			proctest.OK(t, os.Remove(m.socket))
			proctest.OK(t, os.WriteFile(m.socket, nil, 0o600))
		}},
		{"dead at the start of the child", func(t *testing.T, m *manager) { proctest.During(t, step.ChildStarted, m.die) }},
		{"dead when the child is ready", func(t *testing.T, m *manager) { proctest.During(t, step.ReadyReceived, m.die) }},
		{"dead before the commit", func(t *testing.T, m *manager) { proctest.During(t, step.BeforeCommit, m.die) }},
		{"dead after the commit", func(t *testing.T, m *manager) { proctest.During(t, step.AfterCommit, m.die) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := startedByManager(t)
			test.spoil(t, m)
			logger, logbook := proctest.NewLogger()
			upg, s := NewParent(t, tableflip.Options{Logger: logger, DescriptorStore: true}, "succeed")
			proctest.OK(t, proctest.ErrorOf(upg.Listen("tcp", "localhost:0")))
			Upgrade(t, upg)
			s.Await("ready")
			if !proctest.IsClosed(upg.Exit()) {
				t.Error("Exit is open after the upgrade")
			}
			upg.Stop()
			logbook.Await(t, "can't talk to the service manager")
		})
	}
}

func TestManagerUnusable(t *testing.T) {
	for _, socket := range []string{"vsock:2:1234", "notify"} {
		t.Run(socket, func(t *testing.T) {
			t.Setenv("NOTIFY_SOCKET", socket)
			logger, logbook := proctest.NewLogger()
			upg, _ := NewParent(t, tableflip.Options{Logger: logger}, "succeed")
			logbook.Await(t, "NOTIFY_SOCKET is "+`\"`+socket)
			Upgrade(t, upg)
			upg.Stop()
			for len(logbook) > 0 {
				if line := <-logbook; strings.Contains(line, "service manager") {
					t.Errorf("and again: %s", line)
				}
			}
		})
	}
}

func TestManagerClogged(t *testing.T) {
	shorten(t, &systemd.NotifyTimeout)
	m := bindManager(t)
	t.Setenv("NOTIFY_SOCKET", m.socket)
	m.clog()
	logger, logbook := proctest.NewLogger()
	upg, s := NewParent(t, tableflip.Options{Logger: logger, DescriptorStore: true}, "tell-table")
	const sockets = 20
	for range sockets {
		proctest.OK(t, proctest.ErrorOf(upg.Listen("tcp", "localhost:0")))
	}
	Upgrade(t, upg)
	table := s.Await("table").Text

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
	proctest.Role("tell-table", func() {
		proctest.Report("table", Variables())
		MustBeReady(proctest.Must(tableflip.New(tableflip.Options{})))
	})
}
