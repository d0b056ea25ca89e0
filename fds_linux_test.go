package tableflip_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
)

// reusePort lets several sockets share an address.
var reusePort = &net.ListenConfig{
	Control: func(_, _ string, raw syscall.RawConn) error {
		var optionErr error
		err := raw.Control(func(fd uintptr) {
			optionErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		})
		return errors.Join(err, optionErr)
	},
}

// Elsewhere the last listener overwrites the others. With SO_REUSEPORT each has a
// queue of its own, which is lost with it. That Control is applied shows in that
// they can be bound.
func TestSocketsThatShareAPortAreAllHandedOverWithTheirQueues(t *testing.T) {
	env := []string{""}
	upg, s := newParent(t, tableflip.Options{ListenConfig: reusePort}, "answer-all", env...)
	ln := opened[net.Listener](t)(upg.Listen("tcp", "127.0.0.1:0"))
	packets := opened[net.PacketConn](t)(upg.ListenPacket("udp", "127.0.0.1:0"))
	tcp, udp := ln.Addr().String(), packets.LocalAddr().String()
	env[0] = withArg("tcp " + tcp + "\nudp " + udp)
	listeners := []net.Listener{ln}
	for range 2 {
		listeners = append(listeners, opened[net.Listener](t)(upg.Listen("tcp", tcp)))
		opened[net.PacketConn](t)(upg.ListenPacket("udp", udp))
		env[0] += "\ntcp " + tcp + "\nudp " + udp
	}
	// The kernel spreads them over the queues.
	waiting := dialAll(t, 30, ln.Addr())
	var want []string
	for i := range 30 {
		client := opened[net.Conn](t)(net.Dial("udp", udp))
		if _, err := fmt.Fprint(client, i); err != nil {
			t.Fatal(err)
		}
		want = append(want, strconv.Itoa(i))
	}
	upgrade(t, upg)
	for _, ln := range listeners {
		ln.Close()
	}
	for _, got := range answers(t, waiting) {
		if got == "" {
			t.Error("a connection was lost")
		}
	}
	var got []string
	for range want {
		var index, text string
		fmt.Sscan(s.await("datagram").text, &index, &text)
		got = append(got, text)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("received %q, want %q", got, want)
	}
}

func TestErrorOfControlIsWrapped(t *testing.T) {
	broken := errors.New("broken")
	upg := newUpgrader(t, tableflip.Options{ListenConfig: &net.ListenConfig{
		Control: func(string, string, syscall.RawConn) error { return broken },
	}})
	wantError(t, "Listen", listens(upg.Listen("tcp", "localhost:0")), broken)
	wantError(t, "ListenPacket", listens(upg.ListenPacket("udp", "localhost:0")), broken)
}

// Elsewhere the kernel's name for such a socket is no name for it.
func TestAutoboundUnixSocketsAreClaimedByEitherName(t *testing.T) {
	env := []string{""}
	upg, s := newParent(t, tableflip.Options{}, "answer-all", env...)
	var listeners []net.Listener
	var waiting []net.Conn
	for range 2 {
		ln := opened[net.Listener](t)(upg.Listen("unix", ""))
		listeners = append(listeners, ln)
		waiting = append(waiting, dialAll(t, 1, ln.Addr())...)
	}
	packets := opened[net.PacketConn](t)(upg.ListenPacket("unixgram", ""))
	client := opened[net.Conn](t)(net.Dial("unixgram", packets.LocalAddr().String()))
	if _, err := fmt.Fprint(client, "hello"); err != nil {
		t.Fatal(err)
	}
	env[0] = withArg("unix " + listeners[1].Addr().String() + "\nunix \nunixgram " + packets.LocalAddr().String())
	upgrade(t, upg)
	for _, ln := range listeners {
		ln.Close()
	}
	if got := answers(t, waiting); got[0] != "1" || got[1] != "0" {
		t.Errorf("the answers are %q, want the second listener to be claimed first", got)
	}
	if m := s.await("datagram"); m.text != "2 hello" {
		t.Errorf("received %q", m.text)
	}
}

func TestAbstractAndSequencedSocketsAreHandedOver(t *testing.T) {
	abstract := fmt.Sprintf("@tableflip test %d", os.Getpid())
	path := filepath.Join(socketDir(t), "s")
	upg, s := newParent(t, tableflip.Options{}, "answer-all",
		withArg("unix "+abstract+"\nunixpacket "+path+"\nunixgram "+abstract+" gram"))
	var waiting []net.Conn
	for _, socket := range [][2]string{{"unix", abstract}, {"unixpacket", path}} {
		ln := opened[net.Listener](t)(upg.Listen(socket[0], socket[1]))
		defer ln.Close()
		waiting = append(waiting, dialAll(t, 1, ln.Addr())...)
	}
	opened[net.PacketConn](t)(upg.ListenPacket("unixgram", abstract+" gram"))
	client := opened[net.Conn](t)(net.Dial("unixgram", abstract+" gram"))
	if _, err := fmt.Fprint(client, "hello"); err != nil {
		t.Fatal(err)
	}
	upgrade(t, upg)
	if got := answers(t, waiting[:1]); got[0] != "0" {
		t.Errorf("the abstract socket answers %q", got)
	}
	answer := make([]byte, 10)
	waiting[1].SetDeadline(time.Now().Add(patience))
	if n, err := waiting[1].Read(answer); string(answer[:n]) != "1" {
		t.Errorf("the sequenced-packet socket answers %q, %v", answer[:n], err)
	}
	if m := s.await("datagram"); m.text != "2 hello" {
		t.Errorf("received %q", m.text)
	}
}

// An abstract socket has no file, not even one that has its name.
func TestFileWithTheNameOfAnAbstractSocketIsLeftAlone(t *testing.T) {
	t.Chdir(socketDir(t))
	abstract := fmt.Sprintf("@tableflip test %d", os.Getpid())
	opened[net.Listener](t)(net.Listen("unix", "./"+abstract))
	upg := newUpgrader(t, tableflip.Options{})
	ln := opened[net.Listener](t)(upg.Listen("unix", abstract))
	ln.Close()
	upg.Stop()
	if !exists(abstract) {
		t.Error("Stop has unlinked another socket")
	}
}

var keepAlives = []struct {
	story  string
	config net.ListenConfig
	want   string // SO_KEEPALIVE, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT
}{
	{"default", net.ListenConfig{}, "1 15 15 9"},
	{"idle time", net.ListenConfig{KeepAlive: 42 * time.Second}, "1 42 15 9"},
	{"none", net.ListenConfig{KeepAlive: -1}, "0"},
	{"configured", net.ListenConfig{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 77 * time.Second, Interval: 7 * time.Second, Count: 5},
	}, "1 77 7 5"},
	{"configured, which counts more than the idle time", net.ListenConfig{
		KeepAlive:       -1,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 77 * time.Second},
	}, "1 77 15 9"},
}

// keepAliveOf tells the parameters of a connection.
func keepAliveOf(conn net.Conn) (parameters string) {
	option := func(fd uintptr, level, name int) int {
		return must(unix.GetsockoptInt(int(fd), level, name))
	}
	raw := must(conn.(*net.TCPConn).SyscallConn())
	must(0, raw.Control(func(fd uintptr) {
		if option(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE) == 0 {
			parameters = "0"
			return
		}
		parameters = fmt.Sprint("1 ", option(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE), " ",
			option(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL), " ", option(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT))
	}))
	return parameters
}

func TestKeepAliveParametersHoldInEveryGeneration(t *testing.T) {
	for i, test := range keepAlives {
		t.Run(test.story, func(t *testing.T) {
			upg, s := newParent(t, tableflip.Options{ListenConfig: &test.config}, "keep-alive", withArg(strconv.Itoa(i)))
			ln := opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
			dialAll(t, 1, ln.Addr())
			if got := keepAliveOf(opened[net.Conn](t)(ln.Accept())); got != test.want {
				t.Errorf("the parent's connection has %s, want %s", got, test.want)
			}
			dialAll(t, 2, ln.Addr())
			upgrade(t, upg)
			for _, method := range []string{"Accept", "AcceptTCP"} {
				if m := s.await(method); m.text != test.want {
					t.Errorf("a connection of the child's %s has %s, want %s", method, m.text, test.want)
				}
			}
		})
	}
}

func init() {
	roles["keep-alive"] = func() {
		upg := must(tableflip.New(tableflip.Options{ListenConfig: &keepAlives[must(strconv.Atoi(arg()))].config}))
		ln := must(upg.Listen("tcp", "localhost:0"))
		mustBeReady(upg)
		report("Accept", keepAliveOf(must(ln.Accept())))
		report("AcceptTCP", keepAliveOf(must(ln.(interface {
			AcceptTCP() (*net.TCPConn, error)
		}).AcceptTCP())))
		ln.Close()
		if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
			panic(err)
		}
	}
}

// Programs look for the net package's own types.
func TestInheritedSocketsAreThoseOfPackageNet(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg, s := newParent(t, tableflip.Options{}, "types", withArg(path))
	opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	opened[net.Listener](t)(upg.Listen("unix", path))
	opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0"))
	server, _ := connect(t)
	if err := upg.AddConn("tcp", "a", server); err != nil {
		t.Fatal(err)
	}
	upgrade(t, upg)
	if got, want := s.await("types").text, "*net.TCPListener *net.UnixListener *net.UDPConn *net.TCPConn"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func init() {
	roles["types"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		report("types", fmt.Sprintf("%T %T %T %T", must(upg.Listen("tcp", "localhost:0")),
			must(upg.Listen("unix", arg())), must(upg.ListenPacket("udp", "localhost:0")), must(upg.Conn("tcp", "a"))))
		mustBeReady(upg)
	}
}
