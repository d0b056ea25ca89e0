package handovertest

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/proctest"
)

// These tests are about the service manager's descriptor store.

// storeNames returns the names of what is in the store, in order.
func (m *manager) storeNames() []string {
	var names []string
	for _, s := range m.store {
		names = append(names, s.name)
	}
	slices.Sort(names)
	return names
}

// restart starts a first generation with what is in the store.
func (m *manager) restart(s *proctest.Service, cmd *exec.Cmd) {
	var names []string
	var files []*os.File
	for _, kept := range m.store {
		names = append(names, kept.name)
		files = append(files, kept.file)
	}
	activate(s, cmd, files, named(names...))
}

// wantStored checks that the next message stores a copy of socket.
func (m *manager) wantStored(name string, socket syscall.Conn) {
	m.t.Helper()
	m.want(os.Getpid(), storing(name))
	if s := m.store[len(m.store)-1]; !sameSocket(m.t, s.file, socket) {
		m.t.Errorf("%s is another socket", name)
	}
}

// sameSocket reports whether both are descriptors of one socket.
func sameSocket(t *testing.T, a, b syscall.Conn) bool {
	t.Helper()
	var stats [2]unix.Stat_t
	for i, conn := range []syscall.Conn{a, b} {
		raw, err := conn.SyscallConn()
		proctest.OK(t, err)
		proctest.OK(t, raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &stats[i]) }))
		proctest.OK(t, err)
	}
	return stats[0].Dev == stats[1].Dev && stats[0].Ino == stats[1].Ino
}

func TestStore(t *testing.T) {
	m := startedByManager(t)
	path := filepath.Join(proctest.SocketDir(t), "s:ä")
	logger, logbook := proctest.NewLogger()
	upg := NewUpgrader(t, tableflip.Options{DescriptorStore: true, Logger: logger})
	tcp := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	namesake := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	udp := proctest.Opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0"))
	server, _ := proctest.Connect(t)
	proctest.OK(t, upg.AddFile("file", proctest.Opened[*os.File](t)(os.Open(os.DevNull))))
	proctest.OK(t, upg.AddConn("tcp", "conn", server))
	// It would need more than 255 characters.
	proctest.OK(t, upg.AddListener("tcp", strings.Repeat("ä", 50), tcp.(tableflip.Listener)))
	m.wantNoMore() // before Ready
	proctest.OK(t, upg.Ready())
	m.want(os.Getpid(), "READY=1")
	tcpName := storeName("listener", "tcp", "localhost:0")
	udpName := storeName("packet", "udp", "localhost:0")
	m.wantStored(tcpName, tcp.(syscall.Conn))
	m.wantStored(tcpName, namesake.(syscall.Conn))
	m.wantStored(udpName, udp.(syscall.Conn))
	m.wantNoMore()
	logbook.Await(t, "its name is too long")

	// What comes later is stored at once.
	local := proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	localName := storeName("listener", "unix", path)
	m.wantStored(localName, local.(syscall.Conn))

	// The store removes by name, so another socket of that name is stored again.
	proctest.OK(t, upg.RemoveListener("tcp", "localhost:0"))
	m.want(os.Getpid(), removing(tcpName))
	m.wantStored(tcpName, namesake.(syscall.Conn))
	proctest.OK(t, upg.RemovePacketConn("udp", "localhost:0"))
	m.want(os.Getpid(), removing(udpName))
	proctest.OK(t, upg.RemoveListener("tcp", strings.Repeat("ä", 50)))
	m.wantNoMore()

	// What is replaced is removed before its successor is stored.
	successor := proctest.Opened[net.Listener](t)(net.Listen("tcp", "localhost:0"))
	proctest.OK(t, upg.AddListener("unix", path, successor.(tableflip.Listener)))
	m.want(os.Getpid(), removing(localName))
	m.wantStored(localName, successor.(syscall.Conn))

	upg.Stop()
	m.want(os.Getpid(), "STOPPING=1", removing(tcpName), removing(localName))
	m.wantNoMore()
	if len(m.store) > 0 {
		t.Errorf("left in the store: %q", m.storeNames())
	}
}

func TestStoreUnasked(t *testing.T) {
	m := startedByManager(t)
	upg := NewUpgrader(t, tableflip.Options{})
	proctest.OK(t, proctest.ErrorOf(upg.Listen("tcp", "localhost:0")))
	proctest.OK(t, upg.Ready())
	proctest.OK(t, upg.RemoveListener("tcp", "localhost:0"))
	upg.Stop()
	m.want(os.Getpid(), "READY=1", "STOPPING=1")
	m.wantNoMore()
}

// A Listen that meets Stop leaves no copy in the store.
func TestStoreStopMeetsListen(t *testing.T) {
	for range 20 {
		m := startedByManager(t)
		upg := NewUpgrader(t, tableflip.Options{DescriptorStore: true})
		proctest.OK(t, upg.Ready())
		var listening sync.WaitGroup
		for range 4 {
			listening.Go(func() {
				if ln, err := upg.Listen("tcp", "127.0.0.1:0"); err == nil {
					ln.Close()
				}
			})
		}
		upg.Stop()
		proctest.Within(t, "Listen", proctest.Waited(&listening))
		m.sendLast()
		for m.next().Text != last {
		}
		if len(m.store) > 0 {
			t.Fatalf("left in the store: %q", m.storeNames())
		}
	}
}

// Connections wait in the queues while nobody is there.
func TestStoreCrash(t *testing.T) {
	m := newManager(t)
	dir := proctest.SocketDir(t)
	path := filepath.Join(dir, "s")
	sockets := []string{"tcp localhost:0", "tcp localhost:0", "unix " + path, "udp localhost:0"}
	s, first := proctest.Start(t, "keep", m.variable(), proctest.WithArg(strings.Join(sockets, "\n")))
	addrs := strings.Fields(s.Await("ready").Text)
	m.want(first.Process.Pid, "READY=1")
	for _, socket := range sockets {
		m.want(first.Process.Pid, storing(storeNameOf(socket)))
	}
	var waiting []net.Conn
	for i, socket := range sockets {
		network, _, _ := strings.Cut(socket, " ")
		conn := proctest.Opened[net.Conn](t)(net.Dial(network, addrs[i]))
		proctest.Must(io.WriteString(conn, "x"))
		waiting = append(waiting, conn)
	}
	proctest.OK(t, first.Process.Kill())
	s.AwaitEnd()

	// Nothing is changed by one that fails to start.
	s = proctest.NewService(t)
	m.restart(s, s.Command("give-up", m.variable(), proctest.WithArg("unix "+path)))
	s.Await("stopped")
	s.AwaitEnd()
	m.wantNoMore()
	if !proctest.Exists(path) {
		t.Error("the socket's file is gone")
	}

	// More than the service asks for: the last is no more.
	s = proctest.NewService(t)
	m.restart(s, s.Command("keep", m.variable(), proctest.WithArg(strings.Join(sockets[:3], "\n"))))
	again := s.Await("ready")
	if want := strings.Join(addrs[:3], " "); again.Text != want {
		t.Errorf("after the crash it listens on %s, want %s", again.Text, want)
	}
	for _, conn := range waiting[:3] {
		conn.SetDeadline(time.Now().Add(proctest.Patience))
		if answer, err := io.ReadAll(conn); string(answer) != strconv.Itoa(again.PID) {
			t.Errorf("%v: the answer is %q, %v, want %d", conn.RemoteAddr(), answer, err, again.PID)
		}
	}
	m.want(again.PID, "READY=1", removing(storeNameOf(sockets[3])))
	m.wantNoMore()
	proctest.Terminate(t, again.PID)
	s.AwaitEnd()
	m.want(again.PID, "STOPPING=1", removing(storeNameOf(sockets[0])), removing(storeNameOf(sockets[2])))
	m.wantNoMore()
	if proctest.Exists(path) {
		t.Error("Stop has left the socket's file")
	}
}

// Once its parent has told systemd of a child, systemd listens to that, although the
// parent drains.
func TestStoreUpgrade(t *testing.T) {
	for _, stores := range []bool{true, false} {
		t.Run(fmt.Sprint("option ", stores), func(t *testing.T) {
			m := newManager(t)
			const kept, dropped, added = "tcp localhost:0", "tcp 127.0.0.1:0", "udp localhost:0"
			s, parent := proctest.Start(t, "keep", m.variable(),
				proctest.WithArg(strings.Join([]string{kept, dropped, "upgrade " + fmt.Sprint(stores), kept, added}, "\n")))
			s.Await("ready")
			m.want(parent.Process.Pid, "READY=1", storing(storeNameOf(kept)), storing(storeNameOf(dropped)))
			child := s.Await("ready")
			m.want(parent.Process.Pid, reloading, mainPID(child.PID), barrier)
			if stores {
				m.want(child.PID, removing(storeNameOf(dropped)), storing(storeNameOf(added)))
			} else {
				m.want(child.PID, removing(storeNameOf(dropped)), removing(storeNameOf(kept)))
			}
			proctest.Terminate(t, parent.Process.Pid)
			m.wantNoMore()
			proctest.Terminate(t, child.PID)
			s.AwaitEnd()
			m.want(child.PID, "STOPPING=1")
			if stores {
				m.want(child.PID, removing(storeNameOf(kept)), removing(storeNameOf(added)))
			}
			m.wantNoMore()
		})
	}
}

func storeName(kind, network, addr string) string {
	return nametable.StoreName(nametable.Name{Kind: kind, Network: network, Addr: addr})
}

func storeNameOf(socket string) string {
	network, addr, _ := strings.Cut(socket, " ")
	kind := "listener"
	if network == "udp" {
		kind = "packet"
	}
	return storeName(kind, network, addr)
}

func init() {
	// keep has its sockets, NETWORK ADDRESS, stored. What follows the line upgrade
	// is for a child, with the option or without. Once it is ready it answers what a
	// connection says, and stops when it is terminated.
	proctest.Role("keep", func() {
		terminated := proctest.Terminated()
		restarted := os.Getenv("LISTEN_FDS") != ""
		this, rest, upgrade := strings.Cut(proctest.Arg(), "\nupgrade ")
		option, rest, _ := strings.Cut(rest, "\n")
		upg := proctest.Must(tableflip.New(tableflip.Options{
			DescriptorStore: os.Getenv(storeVariable) != "false",
			Command: func(cmd *exec.Cmd) {
				cmd.Env = append(cmd.Env, storeVariable+"="+option, proctest.WithArg(rest))
			},
		}))
		var addrs []any
		var serve []func()
		for socket := range strings.SplitSeq(this, "\n") {
			network, addr, _ := strings.Cut(socket, " ")
			if network == "udp" {
				addrs = append(addrs, proctest.Must(upg.ListenPacket(network, addr)).LocalAddr())
				continue
			}
			ln := proctest.Must(upg.Listen(network, addr))
			addrs = append(addrs, ln.Addr())
			serve = append(serve, func() {
				conn := proctest.Must(ln.Accept())
				proctest.Must(conn.Read(make([]byte, 1)))
				proctest.Must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
				conn.Close()
			})
		}
		if restarted { // else it is to crash
			for _, serve := range serve {
				go serve()
			}
		}
		MustBeReady(upg)
		proctest.Report("ready", addrs...)
		if upgrade {
			proctest.Must(0, upg.Upgrade())
		}
		<-terminated
		upg.Stop()
	})
}

// storeVariable is "false" for a generation without Options.DescriptorStore.
const storeVariable = "HANDOVERTEST_STORE"
