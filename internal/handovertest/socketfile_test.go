//go:build unix

package handovertest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// These tests are about who unlinks the file of a Unix socket.

// A listener that was replaced belongs to its owner again, with its file.
func TestSocketFileReplaced(t *testing.T) {
	dir := proctest.SocketDir(t)
	path, next := filepath.Join(dir, "s"), filepath.Join(dir, "next")
	upg := NewUpgrader(t, tableflip.Options{})
	first := proctest.Must(net.Listen("unix", path)).(*net.UnixListener)
	second := proctest.Must(net.Listen("unix", next)).(*net.UnixListener)
	proctest.OK(t, upg.AddListener("unix", "name", first))
	proctest.OK(t, upg.AddListener("unix", "name", second))
	first.Close()
	second.Close()
	if proctest.Exists(path) {
		t.Error("the file of the replaced listener is left behind")
	}
	if !proctest.Exists(next) {
		t.Error("the file of its successor is gone")
	}
}

// Its successor has bound the path in the meantime: the file is not the old one's.
func TestSocketFileSuccessor(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg := NewUpgrader(t, tableflip.Options{})
	first := proctest.Must(net.Listen("unix", path)).(*net.UnixListener)
	proctest.OK(t, upg.AddListener("unix", path, first))
	proctest.OK(t, os.Remove(path))
	second := proctest.Opened[net.Listener](t)(net.Listen("unix", path)).(*net.UnixListener)
	proctest.OK(t, upg.AddListener("unix", path, second))
	first.Close()
	proctest.Opened[net.Conn](t)(net.Dial("unix", path))
}

func TestSocketFileRemoved(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg := NewUpgrader(t, tableflip.Options{})
	for range 3 {
		ln, err := upg.Listen("unix", path)
		proctest.OK(t, err)
		proctest.OK(t, upg.RemoveListener("unix", path))
		if !proctest.Exists(path) {
			t.Fatal("RemoveListener has unlinked the socket, which is open")
		}
		ln.Close()
		if proctest.Exists(path) {
			t.Fatal("Close has left the socket that is no longer passed on")
		}
	}

	// The owner of a removed packet conn unlinks its file.
	for range 3 {
		conn, err := upg.ListenPacket("unixgram", path)
		proctest.OK(t, err)
		proctest.OK(t, upg.RemovePacketConn("unixgram", path))
		conn.Close()
		proctest.OK(t, os.Remove(path))
	}

	ln, err := upg.Listen("tcp", "localhost:0")
	proctest.OK(t, err)
	addr := ln.Addr().String()
	proctest.OK(t, upg.RemoveListener("tcp", addr))
	ln.Close()
	proctest.Opened[net.Listener](t)(upg.Listen("tcp", addr))
	proctest.WantError(t, "RemoveListener", upg.RemoveListener("tcp", "localhost:0"), os.ErrNotExist)
	proctest.OK(t, upg.RemoveListener("tcp", addr))
}

// The socket of a listener that has two names is removed with the second.
func TestSocketFileTwoNames(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg := NewUpgrader(t, tableflip.Options{})
	ln := proctest.Opened[net.Listener](t)(upg.Listen("unix", path)).(*net.UnixListener)
	proctest.OK(t, upg.AddListener("unix", "another", ln))
	proctest.OK(t, upg.RemoveListener("unix", path))
	ln.Close()
	proctest.Opened[net.Conn](t)(net.Dial("unix", path))
	upg.Stop()
	if proctest.Exists(path) {
		t.Error("Stop has not unlinked the socket")
	}
}

// The address may be one that the new process wants.
func TestSocketFileOfTheChild(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg, s := NewParent(t, tableflip.Options{}, "listen-first", proctest.WithArg(path))
	proctest.OK(t, upg.Ready())
	failed := make(chan error, 1)
	proctest.During(t, step.ChildStarted, func() {
		begun := make(chan struct{})
		go func() {
			close(begun)
			failed <- proctest.ErrorOf(upg.Listen("unix", path))
		}()
		<-begun
	})
	proctest.OK(t, upg.Upgrade())
	proctest.WantError(t, "Listen", proctest.Within(t, "Listen", failed), tableflip.ErrUpgraded)
	s.Await("ready")
	proctest.Opened[net.Conn](t)(net.Dial("unix", path))
}

func init() {
	proctest.Role("listen-first", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Must(upg.Listen("unix", proctest.Arg()))
		MustBeReady(upg)
		proctest.Report("ready")
		proctest.UntilKilled()
	})
}

// A socket that is bound when an upgrade begins, and that comes too late for it,
// is gone.
func TestSocketFileTooLate(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg, _ := NewParent(t, tableflip.Options{}, "succeed")
	proctest.OK(t, upg.Ready())
	var upgraded <-chan error
	beginUpgrade := func() {
		started := make(chan struct{})
		proctest.During(t, step.ChildStarted, func() { close(started) })
		upgraded = proctest.InBackground(upg.Upgrade)
		<-started
	}
	_, err := upg.ListenPacketWithCallback("unixgram", path, func(network, addr string) (net.PacketConn, error) {
		defer beginUpgrade()
		return net.ListenPacket(network, addr)
	})
	proctest.WantError(t, "ListenPacket", err, tableflip.ErrUpgraded)
	proctest.OK(t, proctest.Within(t, "Upgrade", upgraded))
	if proctest.Exists(path) {
		t.Error("the socket is left behind")
	}
}

// In cloudflare/tableflip v1.2.3 a child that fails takes the socket of its parent along:
// an outage.
func TestSocketFileChildFails(t *testing.T) {
	for _, way := range []string{
		"listen", "claim nothing", "close", "remove", "remove and claim again", "add again", "add again and remove", "add by another name",
		"add another listener by its name", "listen elsewhere",
	} {
		t.Run(way, func(t *testing.T) {
			dir := proctest.SocketDir(t)
			path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
			upg, s := NewParent(t, tableflip.Options{}, "fail-with-sockets", proctest.WithArg(way+"\n"+dir))
			local := proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
			proctest.Opened[net.PacketConn](t)(upg.ListenPacket("unixgram", gram))
			proctest.OK(t, upg.Ready())
			var exit *exec.ExitError
			if err := upg.Upgrade(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
				t.Errorf("Upgrade: %v, want exit status 7", err)
			}
			s.Await("stopped")
			left, _ := filepath.Glob(filepath.Join(dir, "*"))
			if want := []string{gram, path}; !slices.Equal(left, want) {
				t.Errorf("there is %v, want %v", left, want)
			}
			proctest.Dial(t, 1, local.Addr())
			proctest.Opened[net.Conn](t)(net.Dial("unixgram", gram))
		})
	}
}

func init() {
	proctest.Role("fail-with-sockets", func() {
		way, dir, _ := strings.Cut(proctest.Arg(), "\n")
		path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		if way != "claim nothing" {
			ln := proctest.Must(upg.Listen("unix", path)).(*net.UnixListener)
			packets := proctest.Must(upg.ListenPacket("unixgram", gram)).(*net.UnixConn)
			other := func() *net.UnixListener {
				return proctest.Must(net.Listen("unix", filepath.Join(dir, "other"))).(*net.UnixListener)
			}
			switch way {
			case "close":
				ln.Close()
				packets.Close()
			case "remove":
				proctest.Must(0, upg.RemoveListener("unix", path))
				proctest.Must(0, upg.RemovePacketConn("unixgram", gram))
				ln.Close()
				packets.Close()
			case "remove and claim again":
				proctest.Must(0, upg.RemoveListener("unix", path))
				if proctest.Must(upg.Listener("unix", path)) == nil {
					panic("it cannot be claimed again")
				}
			case "add again":
				proctest.Must(0, upg.AddListener("unix", path, ln))
				proctest.Must(0, upg.AddPacketConn("unixgram", gram, packets))
			case "add again and remove":
				proctest.Must(0, upg.AddListener("unix", path, ln))
				proctest.Must(0, upg.RemoveListener("unix", path))
				ln.Close()
			case "add by another name":
				proctest.Must(0, upg.AddListener("unix", "another", ln))
				proctest.Must(0, upg.AddPacketConn("unixgram", "another", packets))
				proctest.Must(0, upg.RemoveListener("unix", path))
				ln.Close()
			case "add another listener by its name":
				proctest.Must(0, upg.AddListener("unix", path, other()))
				ln.Close()
			case "listen elsewhere":
				proctest.Must(upg.Listen("unix", filepath.Join(dir, "own")))
				proctest.Must(upg.ListenPacket("unixgram", filepath.Join(dir, "own gram")))
				proctest.Must(0, upg.AddListener("unix", "mine", other()))
			}
		}
		upg.Stop()
		proctest.Report("stopped")
		os.Exit(7)
	})
}

func TestSocketFileLastStop(t *testing.T) {
	dir := proctest.SocketDir(t)
	s, _ := proctest.Start(t, "collect-sockets", proctest.WithArg(dir))
	for generation := 1; generation <= 3; generation++ {
		if m := s.Await("sockets"); m.Text != strconv.Itoa(2*generation) {
			t.Errorf("there are %s sockets in generation %d", m.Text, generation)
		}
	}
	s.AwaitEnd()
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func init() {
	proctest.Role("collect-sockets", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		generation := len(os.Getenv("HANDOVERTEST_GENERATION"))
		os.Setenv("HANDOVERTEST_GENERATION", strings.Repeat("x", generation+1))
		for i := range generation + 1 {
			path := filepath.Join(proctest.Arg(), strconv.Itoa(i))
			// Many services do this, and the file must not be mistaken for another socket's.
			proctest.Must(upg.Listen("unix", path))
			proctest.Must(0, os.Chmod(path, 0o600))
			proctest.Must(upg.ListenPacket("unixgram", path+"gram"))
		}
		MustBeReady(upg)
		proctest.Must(0, upg.WaitForParent(context.Background()))
		all, _ := filepath.Glob(filepath.Join(proctest.Arg(), "*"))
		proctest.Report("sockets", len(all))
		if generation < 2 {
			proctest.Must(0, upg.Upgrade())
			return
		}
		upg.Stop()
	})
}

// A child in charge unlinks what it has inherited, as the first generation does.
func TestSocketFileInherited(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg, s := NewParent(t, tableflip.Options{}, "remove-after-ready", proctest.WithArg(path))
	proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	Upgrade(t, upg)
	if m := s.Await("exists"); m.Text != "true true false" {
		t.Errorf("the socket exists after Ready, RemoveListener and Close: %s", m.Text)
	}
}

func init() {
	proctest.Role("remove-after-ready", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		ln := proctest.Must(upg.Listen("unix", proctest.Arg()))
		MustBeReady(upg)
		atReady := proctest.Exists(proctest.Arg())
		proctest.Must(0, upg.RemoveListener("unix", proctest.Arg()))
		removed := proctest.Exists(proctest.Arg())
		ln.Close()
		proctest.Report("exists", atReady, removed, proctest.Exists(proctest.Arg()))
	})
}

// Another process has put its socket where one of ours was.
func TestSocketFileOfAnother(t *testing.T) {
	dir := proctest.SocketDir(t)
	path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
	upg, s := NewParent(t, tableflip.Options{}, "stop-on-signal")
	proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	proctest.Opened[net.PacketConn](t)(upg.ListenPacket("unixgram", gram))

	// Bound beside it and renamed, as those do who take care.
	proctest.Opened[net.Listener](t)(net.Listen("unix", path+".new"))
	proctest.Opened[net.PacketConn](t)(net.ListenPacket("unixgram", gram+".new"))
	proctest.OK(t, os.Rename(path+".new", path))
	proctest.OK(t, os.Rename(gram+".new", gram))

	wantTheirs := func(when string) {
		t.Helper()
		if !proctest.Exists(path) || !proctest.Exists(gram) {
			t.Fatalf("%s: the socket of another process was unlinked", when)
		}
	}
	Upgrade(t, upg)
	child := s.Await("ready")
	wantTheirs("after an upgrade to a child that claimed nothing")
	proctest.Terminate(t, child.PID)
	s.AwaitEnd()
	wantTheirs("after the child's Stop")
	upg.Stop()

	upg = NewUpgrader(t, tableflip.Options{})
	proctest.OK(t, os.Remove(path))
	proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	proctest.Opened[net.Listener](t)(net.Listen("unix", path+".new"))
	proctest.OK(t, os.Rename(path+".new", path))
	upg.Stop()
	wantTheirs("after Stop of the first generation")
}

func init() {
	proctest.Role("stop-on-signal", func() {
		terminated := proctest.Terminated()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		proctest.Report("ready")
		<-terminated
		upg.Stop()
	})
}

// A socket that was bound under another name and renamed into place is ours.
func TestSocketFileRenamed(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg := NewUpgrader(t, tableflip.Options{})
	proctest.Opened[net.Listener](t)(upg.ListenWithCallback("unix", path, func(network, addr string) (net.Listener, error) {
		ln, err := net.Listen(network, addr+".new")
		if err != nil {
			return nil, err
		}
		return ln, os.Rename(addr+".new", addr)
	}))
	if !proctest.Exists(path) {
		t.Fatal("there is no socket")
	}
	upg.Stop()
	if proctest.Exists(path) {
		t.Error("Stop left the socket")
	}
}

// A path is relative to the directory in which the socket was bound.
func TestSocketFileChdir(t *testing.T) {
	dir := proctest.SocketDir(t)
	t.Chdir(dir)
	upg, s := NewParent(t, tableflip.Options{}, "wandering-sockets")
	proctest.Opened[net.Listener](t)(upg.Listen("unix", "a"))
	proctest.Opened[net.Listener](t)(upg.Listen("unix", "unclaimed"))
	proctest.Opened[net.PacketConn](t)(upg.ListenPacket("unixgram", "./gram"))
	t.Chdir(os.TempDir())
	Upgrade(t, upg)
	child := s.Await("ready")
	if child.Text != "<nil>" {
		t.Error(child.Text)
	}
	if !proctest.Exists(filepath.Join(dir, "a")) || !proctest.Exists(filepath.Join(dir, "gram")) || proctest.Exists(filepath.Join(dir, "unclaimed")) {
		t.Error("Ready should unlink what was not claimed, and only that")
	}
	proctest.Terminate(t, child.PID)
	s.AwaitEnd()
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func init() {
	proctest.Role("wandering-sockets", func() {
		terminated := proctest.Terminated()
		proctest.Must(0, os.Chdir("/"))
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		var missing []error
		if ln, err := upg.Listener("unix", "a"); ln == nil {
			missing = append(missing, fmt.Errorf("a: %w", err))
		}
		if conn, err := upg.PacketConn("unixgram", "./gram"); conn == nil {
			missing = append(missing, fmt.Errorf("./gram: %w", err))
		}
		MustBeReady(upg)
		proctest.Report("ready", errors.Join(missing...))
		<-terminated
		upg.Stop()
	})
}

// A connected socket without an address of its own may be registered under the
// path of its peer, whose file must stay.
func TestSocketFileOfPeer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	peer, err := net.ListenPacket("unixgram", path)
	proctest.OK(t, err)
	defer peer.Close()
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	proctest.OK(t, err)
	defer conn.Close()
	upg, _ := NewParent(t, tableflip.Options{}, "fail")
	proctest.OK(t, upg.AddPacketConn("unixgram", path, conn))
	proctest.OK(t, upg.Ready())
	upg.Stop()
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

// A listener unlinks by name when it is closed, so that it must not get that duty
// back once its file is another's.
func TestSocketFileRebound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	upg, _ := NewParent(t, tableflip.Options{}, "fail")
	old, err := upg.Listen("unix", path)
	proctest.OK(t, err)
	proctest.OK(t, os.Remove(path))
	other, err := net.Listen("unix", path)
	proctest.OK(t, err)
	defer other.Close()
	proctest.OK(t, upg.RemoveListener("unix", path))
	old.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

func TestSocketFileOfTheDead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	proctest.OK(t, err)
	upg, _ := NewParent(t, tableflip.Options{}, "fail")
	if _, err := upg.Listen("unix", path); !errors.Is(err, syscall.EADDRINUSE) {
		t.Fatalf("while it is open: %v, want that the address is in use", err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	proctest.Opened[net.Conn](t)(net.Dial("unix", path))
}

func TestSocketFileOfDeadGram(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "socket")
	dead := proctest.Opened[*net.UnixConn](t)(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}))
	upg := NewUpgrader(t, tableflip.Options{})
	if _, err := upg.ListenPacket("unixgram", path); !errors.Is(err, syscall.EADDRINUSE) {
		t.Fatalf("while it is open: %v, want that the address is in use", err)
	}
	proctest.OK(t, dead.Close()) // which leaves the file
	conn := proctest.Opened[net.PacketConn](t)(upg.ListenPacket("unixgram", path))
	sender := proctest.Opened[net.Conn](t)(net.Dial("unixgram", path))
	proctest.Must(sender.Write([]byte("x")))
	conn.SetDeadline(time.Now().Add(proctest.Patience))
	if n, _, err := conn.ReadFrom(make([]byte, 1)); n != 1 {
		t.Error(err)
	}
}
