//go:build unix

package handovertest

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// Parent and child share the flags of an open file, above all its blocking mode: a change
// by one of them is a change for both.

// A shareable is what can be passed on.
type shareable interface {
	io.Closer
	syscall.Conn
}

// shareables are of every kind, in both blocking modes where there are two.
var shareables = []struct {
	name string
	open func(t *testing.T) (shareable, error)
}{

	{"TCP listener", func(*testing.T) (shareable, error) {
		return net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	}},
	{"Unix listener", func(t *testing.T) (shareable, error) {
		return net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(proctest.SocketDir(t), "socket"), Net: "unix"})
	}},
	{"UDP socket", func(*testing.T) (shareable, error) {
		return net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	}},
	{"Unix datagram socket", func(t *testing.T) (shareable, error) {
		return net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(proctest.SocketDir(t), "socket"), Net: "unixgram"})
	}},
	{"TCP connection", func(t *testing.T) (shareable, error) {
		ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { ln.Close() })
		return net.DialTCP("tcp", nil, ln.Addr().(*net.TCPAddr))
	}},
	{"pipe", func(t *testing.T) (shareable, error) {
		read, write, err := os.Pipe()
		t.Cleanup(func() { write.Close() })
		return read, err
	}},
	{"blocking pipe", func(t *testing.T) (shareable, error) {
		var ends [2]int
		err := syscall.Pipe(ends[:])
		t.Cleanup(func() { syscall.Close(ends[1]) })
		return os.NewFile(uintptr(ends[0]), "pipe"), err
	}},
	{"regular file", func(t *testing.T) (shareable, error) {
		return os.CreateTemp(t.TempDir(), "")
	}},
	{"terminal", func(*testing.T) (shareable, error) {
		return os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	}},
	{"blocking terminal", func(*testing.T) (shareable, error) {
		fd, err := syscall.Open("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
		return os.NewFile(uintptr(fd), "terminal"), err
	}},
}

// pass adds a shareable to the registry.
func pass(upg *tableflip.Upgrader, name string, s shareable) error {
	switch s := s.(type) {
	case *os.File:
		return upg.AddFile(name, s)
	case tableflip.Listener:
		return upg.AddListener("test", name, s)
	case *net.TCPConn:
		return upg.AddConn("test", name, s)
	case tableflip.PacketConn:
		return upg.AddPacketConn("test", name, s)
	}
	return fmt.Errorf("%T is not shareable", s)
}

// claim takes the shareable that pass has added.
func claim(upg *tableflip.Upgrader, name string) shareable {
	if ln := proctest.Must(upg.Listener("test", name)); ln != nil {
		return ln.(shareable)
	}
	if conn := proctest.Must(upg.PacketConn("test", name)); conn != nil {
		return conn.(shareable)
	}
	if conn := proctest.Must(upg.Conn("test", name)); conn != nil {
		return conn.(shareable)
	}
	return proctest.Must(upg.File(name))
}

// statusFlags returns what belongs to the open file that processes share, of
// which O_NONBLOCK is a part.
func statusFlags(c syscall.Conn) (flags int) {
	raw := proctest.Must(c.SyscallConn())
	if err := raw.Control(func(fd uintptr) {
		flags = proctest.Must(unix.FcntlInt(fd, syscall.F_GETFL, 0))
	}); err != nil {
		panic(err)
	}
	return flags
}

const failVariable = "HANDOVERTEST_FAIL"

func init() {
	// hold claims all shareables, and holds them until the end of the test.
	proctest.Role("hold", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		held := map[string]shareable{}
		flags := map[string]int{}
		for _, s := range shareables {
			held[s.name] = claim(upg, s.name)
			flags[s.name] = statusFlags(held[s.name])
		}
		proctest.Report("flags", fmt.Sprint(flags))
		if os.Getenv(failVariable) != "" {
			os.Exit(7)
		}
		MustBeReady(upg)
		proctest.Report("ready")
		select {}
	})
	// take claims a listener, and does not accept from it.
	proctest.Role("take", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Must(upg.Listener("test", "listener"))
		if os.Getenv(failVariable) != "" {
			os.Exit(7)
		}
		MustBeReady(upg)
		proctest.Report("ready")
		select {}
	})
}

// TestFlags checks that an upgrade, failed or not, changes the
// blocking mode of nothing that is passed on, nor any other status flag.
func TestFlags(t *testing.T) {
	env := []string{failVariable + "=1"}
	input, inputWriter, err := os.Pipe()
	proctest.OK(t, err)
	defer inputWriter.Close()
	defer input.Close()
	upg, s := NewParent(t, tableflip.Options{
		Command: func(cmd *exec.Cmd) { cmd.Stdin = input },
	}, "hold", env...)

	passed := map[string]shareable{}
	flags := func() string {
		flags := map[string]int{}
		for name, s := range passed {
			flags[name] = statusFlags(s)
		}
		return fmt.Sprint(flags)
	}
	for _, s := range shareables {
		c, err := s.open(t)
		proctest.OK(t, err)
		t.Cleanup(func() { c.Close() })
		passed[s.name] = c
	}
	want := flags()
	inputFlags, outputFlags := statusFlags(input), statusFlags(s.Output)
	wantFlags := func(when string) {
		t.Helper()
		if got := flags(); got != want {
			t.Errorf("%s the flags are %s; they were %s", when, got, want)
		}
		if got := statusFlags(input); got != inputFlags {
			t.Errorf("%s the flags of the standard input are %#x; they were %#x", when, got, inputFlags)
		}
		if got := statusFlags(s.Output); got != outputFlags {
			t.Errorf("%s the flags of the standard output are %#x; they were %#x", when, got, outputFlags)
		}
	}

	for name, s := range passed {
		proctest.OK(t, pass(upg, name, s))
	}
	wantFlags("after adding")
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil {
		t.Fatal("the child did not fail")
	}
	wantFlags("after a failed upgrade")
	if got := s.Await("flags").Text; got != want {
		t.Errorf("in the child that failed the flags are %s; they were %s", got, want)
	}

	env[0] = failVariable + "="
	proctest.OK(t, upg.Upgrade())
	wantFlags("after a successful upgrade")
	if got := s.Await("flags").Text; got != want {
		t.Errorf("in the child the flags are %s; they were %s", got, want)
	}
	s.Await("ready")
	wantFlags("when the child is in charge")
}

// TestAcceptAndClose checks that after an upgrade, failed or not, the
// parent's Accept still accepts, and its Close still wakes Accept up.
func TestAcceptAndClose(t *testing.T) {
	children := []struct {
		name     string
		role     string
		fail     string
		succeeds bool
	}{
		{"child exits", "fail", "", false},
		// Taking a listener makes it non-blocking, should it not be so.
		{"child takes the listener and exits", "take", "1", false},
		{"child takes the listener and the charge", "take", "", true},
	}
	for _, child := range children {
		for _, network := range []string{"tcp", "unix"} {
			t.Run(child.name+"/"+network, func(t *testing.T) {
				upg, s := NewParent(t, tableflip.Options{}, child.role, failVariable+"="+child.fail)
				addr := "127.0.0.1:0"
				if network == "unix" {
					addr = filepath.Join(proctest.SocketDir(t), "socket")
				}
				ln, err := net.Listen(network, addr)
				proctest.OK(t, err)
				t.Cleanup(func() { ln.Close() })
				proctest.OK(t, upg.AddListener("test", "listener", ln.(tableflip.Listener)))
				accepted := make(chan error, 10)
				go func() {
					for {
						conn, err := ln.Accept()
						accepted <- err
						if err != nil {
							return
						}
						conn.Close()
					}
				}()

				proctest.OK(t, upg.Ready())
				if err := upg.Upgrade(); (err == nil) != child.succeeds {
					t.Fatal(err)
				}
				if child.succeeds {
					s.Await("ready")
				}
				// After the first, Accept asks the kernel again.
				for range 2 {
					conn, err := net.DialTimeout(network, ln.Addr().String(), proctest.Patience)
					proctest.OK(t, err)
					defer conn.Close()
					proctest.WantError(t, "Accept", proctest.Within(t, "Accept", accepted), nil)
				}
				closed := make(chan error, 1)
				go func() { closed <- ln.Close() }()
				proctest.WantError(t, "Close", proctest.Within(t, "Close", closed), nil)
				proctest.WantError(t, "Accept after Close", proctest.Within(t, "Accept after Close", accepted), net.ErrClosed)
			})
		}
	}
}

// addPipes passes on one end of a pipe of each blocking mode, as the files "pollable" and
// "blocking". All ends stay open until the end of the test.
func addPipes(t *testing.T, upg *tableflip.Upgrader) (pollable, blocking *os.File, others []*os.File) {
	t.Helper()
	pollable, other, err := os.Pipe()
	proctest.OK(t, err)
	var pair [2]int
	proctest.OK(t, unix.Pipe(pair[:]))
	blocking = os.NewFile(uintptr(pair[0]), "")
	others = []*os.File{other, os.NewFile(uintptr(pair[1]), "")}
	for _, file := range append([]*os.File{pollable, blocking}, others...) {
		t.Cleanup(func() { file.Close() })
	}
	proctest.OK(t, upg.AddFile("pollable", pollable))
	proctest.OK(t, upg.AddFile("blocking", blocking))
	return pollable, blocking, others
}

func TestFlagsUpgradeFails(t *testing.T) {
	upg, _ := NewParent(t, tableflip.Options{}, "fail")
	ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0")).(*net.TCPListener)
	server, _ := proctest.Connect(t)
	proctest.OK(t, upg.AddConn("tcp", "a", server))
	pollable, blocking, others := addPipes(t, upg)
	stdin := os.Stdin
	defer func() { os.Stdin = stdin }()
	os.Stdin = pollable

	flags := func() (all []int) {
		for _, source := range []syscall.Conn{ln, server, pollable, blocking, others[0], others[1]} {
			raw, err := source.SyscallConn()
			proctest.OK(t, err)
			proctest.OK(t, raw.Control(func(fd uintptr) {
				for _, command := range []int{unix.F_GETFL, unix.F_GETFD} {
					flag, err := unix.FcntlInt(fd, command, 0)
					proctest.OK(t, err)
					all = append(all, flag)
				}
			}))
		}
		return all
	}
	before := flags()
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil {
		t.Fatal("no error")
	}
	if after := flags(); !slices.Equal(after, before) {
		t.Errorf("after a failed upgrade the flags are %o, and were %o", after, before)
	}
}

func TestFlagsInChild(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "claim-files")
	pollable, blocking, _ := addPipes(t, upg)
	Upgrade(t, upg)
	s.Await("claimed")
	isNonblocking := func(file *os.File) bool { return statusFlags(file)&unix.O_NONBLOCK != 0 }
	if !isNonblocking(pollable) || isNonblocking(blocking) {
		t.Errorf("non-blocking: %v %v, want true false", isNonblocking(pollable), isNonblocking(blocking))
	}
}

func init() {
	proctest.Role("claim-files", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Must(upg.File("pollable"))
		proctest.Must(upg.File("blocking"))
		MustBeReady(upg)
		proctest.Report("claimed")
		proctest.UntilKilled()
	})
}
