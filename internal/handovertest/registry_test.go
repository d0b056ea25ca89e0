//go:build unix

package handovertest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// These tests are about the old version's sockets that a new version finds. Those that
// need no processes are in package registry.

func init() {
	// listen-at listens where it is told, and answers with its PID.
	proctest.Role("listen-at", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		network, addr, _ := strings.Cut(proctest.Arg(), " ")
		ln, err := upg.Listen(network, addr)
		if err != nil {
			proctest.Report("failed", err)
			os.Exit(7)
		}
		MustBeReady(upg)
		proctest.Report("ready", fmt.Sprintf("%T", ln))
		for {
			conn := proctest.Must(ln.Accept())
			proctest.Must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
			conn.Close()
		}
	})
	// listen-late asks for what it was passed when it is too late.
	proctest.Role("listen-late", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		network, addr, _ := strings.Cut(proctest.Arg(), " ")
		_, err := upg.Listen(network, addr)
		proctest.Report("listened", err)
		proctest.UntilKilled()
	})
	// join claims the packet conn that its argument names, and joins the group of its parent.
	proctest.Role("join", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		conn := proctest.Must(upg.ListenPacket("udp4", proctest.Arg()))
		proctest.Must(0, joinGroup(conn))
		MustBeReady(upg)
		proctest.Report("ready")
		datagram := make([]byte, 100)
		n, _, err := conn.ReadFrom(datagram)
		proctest.Report("datagram", string(datagram[:n]), err)
	})
}

// A new version may spell an address otherwise.
func TestRegistrySpelling(t *testing.T) {
	env := []string{""}
	upg, s := NewParent(t, tableflip.Options{}, "listen-at", env...)
	ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "127.0.0.1:0"))
	_, port, err := net.SplitHostPort(ln.Addr().String())
	proctest.OK(t, err)
	proctest.OK(t, upg.Ready())

	// An address that is not the same is in use, and the error names what was not claimed.
	env[0] = proctest.WithArg("tcp :" + port)
	if err := upg.Upgrade(); err == nil {
		t.Error("the child has found another socket")
	}
	failed := s.Await("failed").Text
	for _, want := range []string{"address already in use", "inherited and not claimed", "listener:tcp:127.0.0.1:0", ln.Addr().String()} {
		if !strings.Contains(failed, want) {
			t.Errorf("%q does not say %q", failed, want)
		}
	}

	env[0] = proctest.WithArg("tcp localhost:" + port)
	proctest.OK(t, upg.Upgrade())
	ln.Close()
	child := s.Await("ready")
	if got := proctest.Answer(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.PID) {
		t.Errorf("%s answers, want %d", got, child.PID)
	}
}

// A child that claims a socket after Ready is told that this is too late.
func TestRegistryLateClaim(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	for _, way := range []string{"tcp 127.0.0.1:0", "unix " + path} {
		upg, s := NewParent(t, tableflip.Options{}, "listen-late", proctest.WithArg(way))
		network, addr, _ := strings.Cut(way, " ")
		proctest.Opened[net.Listener](t)(upg.Listen(network, addr))
		Upgrade(t, upg)
		got := s.Await("listened").Text
		for _, want := range []string{"was inherited", "not claimed before Ready", "closed", addr} {
			if !strings.Contains(got, want) {
				t.Errorf("%s: %q does not say %q", way, got, want)
			}
		}
		upg.Stop()
	}
}

// A socket that no client could reach is bound anew.
func TestRegistryLostFile(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg, s := NewParent(t, tableflip.Options{}, "listen-at", proctest.WithArg("unix "+path))
	proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	proctest.OK(t, os.Remove(path))
	Upgrade(t, upg)
	child := s.Await("ready")
	if got := proctest.Answer(t, "unix", path); got != strconv.Itoa(child.PID) {
		t.Errorf("%s answers, want %d", got, child.PID)
	}
	upg.Stop()
	if !proctest.Exists(path) {
		t.Error("the old process has unlinked the new one's file")
	}
}

// A countingListener is what many wrap a listener in.
type countingListener struct {
	*net.TCPListener
	accepted int
}

func (l *countingListener) Accept() (net.Conn, error) {
	l.accepted++
	return l.TCPListener.Accept()
}

// A callback's wrapper is accepted, and the log says that the next generation lacks it.
func TestRegistryWrapper(t *testing.T) {
	logger, logbook := proctest.NewLogger()
	upg, s := NewParent(t, tableflip.Options{Logger: logger}, "listen-at", proctest.WithArg("tcp localhost:0"))
	ln, err := upg.ListenWithCallback("tcp", "localhost:0", func(network, addr string) (net.Listener, error) {
		ln, err := net.Listen(network, addr)
		return &countingListener{TCPListener: ln.(*net.TCPListener)}, err
	})
	proctest.OK(t, err)
	defer ln.Close()
	if line := logbook.Await(t, "wrap what Listen returns"); !strings.Contains(line, "countingListener") {
		t.Errorf("logged %s", line)
	}
	if _, ok := ln.(*countingListener); !ok {
		t.Errorf("got a %T", ln)
	}
	Upgrade(t, upg)
	if m := s.Await("ready"); m.Text != "*net.TCPListener" {
		t.Errorf("the child has a %s", m.Text)
	}
}

// joinGroup is the pattern of the documentation of ListenPacket.
func joinGroup(conn net.PacketConn) error {
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		return err
	}
	var joinErr error
	err = raw.Control(func(fd uintptr) {
		group := &syscall.IPMreq{Multiaddr: [4]byte{239, 1, 2, 3}, Interface: [4]byte{127, 0, 0, 1}}
		joinErr = syscall.SetsockoptIPMreq(int(fd), syscall.IPPROTO_IP, syscall.IP_ADD_MEMBERSHIP, group)
	})
	if errors.Is(joinErr, syscall.EADDRINUSE) {
		joinErr = nil // the parent has joined with this socket
	}
	return errors.Join(err, joinErr)
}

// A child that joins the group of its parent gets the group's datagrams.
func TestRegistryMulticast(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "join", proctest.WithArg("0.0.0.0:0"))
	conn := proctest.Opened[net.PacketConn](t)(upg.ListenPacket("udp4", "0.0.0.0:0"))
	proctest.OK(t, joinGroup(conn))
	Upgrade(t, upg)
	s.Await("ready")
	conn.Close()

	client := proctest.Opened[net.PacketConn](t)(net.ListenPacket("udp4", "127.0.0.1:0"))
	group := &net.UDPAddr{IP: net.IPv4(239, 1, 2, 3), Port: conn.LocalAddr().(*net.UDPAddr).Port}
	if _, err := client.WriteTo([]byte("hello"), group); err != nil {
		t.Skip("no multicast on this system: ", err)
	}
	if m := s.Await("datagram"); m.Text != "hello <nil>" {
		t.Errorf("the child got %q", m.Text)
	}
}
