//go:build unix

package registry_test

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/registry"
)

// The generations of these tests are registries in one process. Where it takes
// processes, see package handovertest.

var (
	errStopped = errors.New("stopped")
	nextFD     atomic.Int64
)

func newRegistry(t *testing.T, opts registry.Options, first uintptr, entries []*nametable.Entry) *registry.Registry {
	t.Helper()
	r, err := registry.New(opts, first, entries)
	proctest.OK(t, err)
	t.Cleanup(func() { r.Stop(false, errStopped) })
	return r
}

// firstGeneration returns a registry in charge that has inherited nothing.
func firstGeneration(t *testing.T, opts registry.Options) *registry.Registry {
	t.Helper()
	r := newRegistry(t, opts, 0, nil)
	r.TakeCharge()
	return r
}

// child returns the registry of a child of parent, which has not taken charge yet.
func child(t *testing.T, parent *registry.Registry, opts registry.Options) *registry.Registry {
	t.Helper()
	return childWith(t, parent, opts, func(*nametable.Entry) {})
}

// childWith is child with entries that were changed on their way.
func childWith(t *testing.T, parent *registry.Registry, opts registry.Options, change func(*nametable.Entry)) *registry.Registry {
	t.Helper()
	entries, fds, release, err := parent.FreezeForChild()
	proctest.OK(t, err)
	defer parent.Unfreeze()
	defer release()
	// Where no other descriptor is.
	first := 1000 + uintptr(nextFD.Add(int64(len(fds)))) - uintptr(len(fds))
	for i, fd := range fds {
		want := first + uintptr(i)
		got, err := unix.FcntlInt(fd, syscall.F_DUPFD_CLOEXEC, int(want))
		if err == nil && got != int(want) {
			err = fmt.Errorf("descriptor %d is taken", want)
		}
		proctest.OK(t, err)
		entries[i] = entries[i].With(change)
	}
	return newRegistry(t, opts, first, entries)
}

// logTo returns a logger and what it is told.
func logTo(logger **slog.Logger) proctest.Logbook {
	l, book := proctest.NewLogger()
	*logger = l
	return book
}

func logged(book proctest.Logbook) string {
	var all strings.Builder
	for {
		select {
		case line := <-book:
			all.WriteString(line)
		default:
			return all.String()
		}
	}
}

func wantText(t *testing.T, what, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%s: %q does not say %q", what, text, part)
		}
	}
}

func wantInUse(t *testing.T, what string, err error) {
	t.Helper()
	proctest.WantError(t, what, err, syscall.EADDRINUSE)
}

// dead leaves a socket's file that nobody listens on.
func dead(t *testing.T, network, path string) {
	t.Helper()
	if network == "unixgram" {
		proctest.OK(t, proctest.Must(net.ListenPacket(network, path)).Close())
		return
	}
	ln := proctest.Must(net.Listen(network, path)).(*net.UnixListener)
	ln.SetUnlinkOnClose(false)
	proctest.OK(t, ln.Close())
}

// Who unlinks a socket's file.

// Whatever removes a Unix socket whose owner has closed it unlinks the file.
func TestClosedSocketFile(t *testing.T) {
	for _, inherited := range []bool{false, true} {
		t.Run(fmt.Sprintf("inherited %v", inherited), func(t *testing.T) {
			dir := proctest.SocketDir(t)
			path := func(name string) string { return filepath.Join(dir, name) }
			r := firstGeneration(t, registry.Options{})
			sockets := map[string]io.Closer{}
			listen := func() {
				for _, name := range []string{"removed", "replaced", "twice"} {
					sockets[name] = proctest.Must(r.Listen("unix", path(name)))
				}
				sockets["gram"] = proctest.Must(r.ListenPacket("unixgram", path("gram")))
			}
			listen()
			if inherited {
				r = child(t, r, registry.Options{})
				listen()
				r.TakeCharge()
			}
			twice := sockets["twice"].(*net.UnixListener)
			proctest.OK(t, r.AddListener("unix", "again", twice, true))
			for _, socket := range sockets {
				proctest.OK(t, socket.Close())
			}

			proctest.OK(t, r.RemoveListener("unix", path("removed")))
			other := proctest.Opened[net.Listener](t)(net.Listen("tcp", "localhost:0"))
			proctest.OK(t, r.AddListener("unix", path("replaced"), other.(registry.Listener), true))
			proctest.OK(t, r.RemovePacketConn("unixgram", path("gram")))
			for _, name := range []string{"removed", "replaced", "gram"} {
				if proctest.Exists(path(name)) {
					t.Errorf("the file %q, whose owner has closed it, is left behind", name)
				}
			}

			proctest.OK(t, r.RemoveListener("unix", path("twice")))
			if !proctest.Exists(path("twice")) {
				t.Error("the file of a socket that is still passed on is gone")
			}
			proctest.OK(t, r.RemoveListener("unix", "again"))
			if proctest.Exists(path("twice")) {
				t.Error("the file is left behind when the last of its names is removed")
			}
		})
	}
}

// A socket that was bound at the path since keeps its file.
func TestClosedSocketFileSuccessor(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	r := firstGeneration(t, registry.Options{})
	ln := proctest.Must(r.Listen("unix", path))
	proctest.OK(t, os.Remove(path))
	proctest.Opened[net.Listener](t)(net.Listen("unix", path))
	proctest.OK(t, ln.Close())
	proctest.OK(t, r.RemoveListener("unix", path))
	if !proctest.Exists(path) {
		t.Error("the file of another socket is gone")
	}
}

// A file that was put where the socket was bound is no socket's.
func TestRenamedSocketFile(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	r := firstGeneration(t, registry.Options{})
	ln := proctest.Opened[net.Listener](t)(net.Listen("unix", path))
	proctest.OK(t, os.Rename(path, path+"2"))
	proctest.OK(t, os.WriteFile(path, nil, 0o600))
	proctest.OK(t, r.AddListener("unix", path, ln.(registry.Listener), true))
	r.Stop(true, errStopped)
	if !proctest.Exists(path) {
		t.Error("a file that is no socket is gone")
	}
}

// The parent has died, and this process ends before it was ready: nobody else unlinks.
func TestStopInChargeEarly(t *testing.T) {
	dir := proctest.SocketDir(t)
	r := firstGeneration(t, registry.Options{})
	for _, name := range []string{"claimed", "unclaimed"} {
		proctest.OK(t, proctest.ErrorOf(r.Listen("unix", filepath.Join(dir, name))))
	}
	c := child(t, r, registry.Options{})
	proctest.OK(t, proctest.ErrorOf(c.Listen("unix", filepath.Join(dir, "claimed"))))
	c.Stop(true, errStopped)
	if left := proctest.Must(os.ReadDir(dir)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

type hidesUnlink struct{ net.Listener }

func (h hidesUnlink) SyscallConn() (syscall.RawConn, error) {
	return h.Listener.(syscall.Conn).SyscallConn()
}

// The Close of a wrapper that hides SetUnlinkOnClose would unlink the file.
func TestHiddenUnlinkOnClose(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	r := firstGeneration(t, registry.Options{})
	ln := proctest.Opened[net.Listener](t)(net.Listen("unix", path))
	err := r.AddListener("unix", path, hidesUnlink{ln}, true)
	wantText(t, "AddListener", fmt.Sprint(err), "registry_test.hidesUnlink", "SetUnlinkOnClose", path)
	_, err = r.ListenWithCallback("unix", path+"2", func(network, addr string) (net.Listener, error) {
		ln, err := net.Listen(network, addr)
		return hidesUnlink{ln}, err
	})
	wantText(t, "ListenWithCallback", fmt.Sprint(err), "SetUnlinkOnClose")
	if proctest.Exists(path + "2") {
		t.Error("a socket that was refused is left behind")
	}

	// Without a file there is nothing to unlink.
	tcp := proctest.Opened[net.Listener](t)(net.Listen("tcp", "localhost:0"))
	proctest.OK(t, r.AddListener("tcp", "x", hidesUnlink{tcp}, true))
}

// Of several that replace a dead socket's file at once, one gets the path and keeps it.
func TestDeadSocketFileRace(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	for range 500 {
		dead(t, "unix", path)
		var listeners [4]net.Listener
		var errs [4]error
		var all sync.WaitGroup
		for i := range listeners {
			r := newRegistry(t, registry.Options{}, 0, nil)
			all.Go(func() { listeners[i], errs[i] = r.Listen("unix", path) })
		}
		all.Wait()
		won := 0
		for i, ln := range listeners {
			if errs[i] != nil {
				wantInUse(t, "Listen", errs[i])
				continue
			}
			won++
			conn, err := net.Dial("unix", path)
			if err != nil {
				t.Fatalf("the one that got the path can't be reached: %v", err)
			}
			conn.Close()
			ln.(*net.UnixListener).SetUnlinkOnClose(true)
			ln.Close()
		}
		if won != 1 {
			t.Fatalf("%d got the path, want one", won)
		}
		_ = os.Remove(path)
		if left, _ := filepath.Glob(filepath.Dir(path) + "/.*"); len(left) > 0 {
			t.Fatalf("left: %v", left)
		}
	}
}

// What is added.

// A listener replaces the one before it even if the name leaves the port open.
func TestAddListenerPortZero(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	var last net.Listener
	for range 3 {
		last = proctest.Opened[net.Listener](t)(net.Listen("tcp", "localhost:0"))
		proctest.OK(t, r.AddListener("tcp", "localhost:0", last.(registry.Listener), true))
	}
	c := child(t, r, registry.Options{})
	if ln := proctest.Must(c.Listener("tcp", "localhost:0")); ln == nil || ln.Addr().String() != last.Addr().String() {
		t.Errorf("inherited %v, want %v", ln, last.Addr())
	}
	if ln := proctest.Must(c.Listener("tcp", "localhost:0")); ln != nil {
		t.Errorf("inherited %v too, which was replaced", ln.Addr())
	}
}

// What a child adds does not take the place of what it has inherited and may claim yet.
func TestAddListenerBesideInherited(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	before := proctest.Must(r.Listen("tcp", "localhost:0"))
	c := child(t, r, registry.Options{})
	proctest.WantError(t, "RemoveListener", c.RemoveListener("tcp", "localhost:0"), os.ErrNotExist)
	other := proctest.Opened[net.Listener](t)(net.Listen("tcp", "localhost:0"))
	proctest.OK(t, c.AddListener("tcp", "localhost:0", other.(registry.Listener), true))
	if ln := proctest.Must(c.Listener("tcp", "localhost:0")); ln == nil || ln.Addr().String() != before.Addr().String() {
		t.Errorf("inherited %v, want %v", ln, before.Addr())
	}
}

// Sockets that package net does not know.
type fdListener struct {
	net.Listener
	file *os.File
}

func (s fdListener) SyscallConn() (syscall.RawConn, error) { return s.file.SyscallConn() }

type fdConn struct {
	net.Conn
	file *os.File
}

func (s fdConn) SyscallConn() (syscall.RawConn, error) { return s.file.SyscallConn() }

type fdPacketConn struct {
	net.PacketConn
	file *os.File
}

func (s fdPacketConn) SyscallConn() (syscall.RawConn, error) { return s.file.SyscallConn() }

// The next generation does not get the type that a callback returned.
func TestWrapperIsWarnedOf(t *testing.T) {
	var opts registry.Options
	book := logTo(&opts.Logger)
	r := firstGeneration(t, opts)
	for _, wrapped := range []bool{false, true} {
		proctest.Must(r.ListenWithCallback("tcp", "localhost:0", func(network, addr string) (net.Listener, error) {
			ln, err := net.Listen(network, addr)
			if wrapped {
				return hidesUnlink{ln}, err
			}
			return ln, err
		}))
		proctest.Must(r.ListenPacketWithCallback("udp", "localhost:0", func(network, addr string) (net.PacketConn, error) {
			conn, err := net.ListenPacket(network, addr)
			if wrapped {
				return struct{ *net.UDPConn }{conn.(*net.UDPConn)}, err
			}
			return conn, err
		}))
		text := logged(book)
		if !wrapped && text != "" {
			t.Errorf("logged %s", text)
		}
		if wrapped {
			wantText(t, "log", text, "listener:tcp:localhost:0", "registry_test.hidesUnlink", "packet:udp:localhost:0", "wrap what Listen returns")
		}
	}
}

// Control is not called for an inherited socket.
func TestOptionsOfInheritedSockets(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	ln := proctest.Must(r.Listen("tcp", "127.0.0.1:0"))
	conn := proctest.Must(r.ListenPacket("udp", "127.0.0.1:0"))
	c := child(t, r, registry.Options{ListenConfig: net.ListenConfig{
		Control: func(string, string, syscall.RawConn) error { return errors.New("Control was called") },
	}})
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	proctest.OK(t, proctest.ErrorOf(c.Listen("tcp", "localhost:"+port)))
	proctest.OK(t, proctest.ErrorOf(c.ListenPacket("udp", conn.LocalAddr().String())))
}

// Listeners are those that the next child gets: not what nobody has claimed, and nothing
// but listeners and packet conns.
func TestListeners(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	proctest.Must(r.Listen("tcp", "localhost:0"))
	proctest.Must(r.Listen("tcp", "127.0.0.1:0"))
	proctest.Must(r.ListenPacket("udp", "localhost:0"))
	proctest.OK(t, r.AddFile("file", os.Stderr))
	c := child(t, r, registry.Options{}) // now the newest
	if got := registry.Listeners(); got == nil || len(got) > 0 {
		t.Errorf("before any claim: %q", got)
	}
	proctest.Must(c.Listen("tcp", "localhost:0"))
	proctest.Must(c.ListenPacket("udp", "localhost:0"))
	proctest.Must(c.File("file"))
	if got, want := registry.Listeners(), []string{"tcp localhost:0", "udp localhost:0"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
