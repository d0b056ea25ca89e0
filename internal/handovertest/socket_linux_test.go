package handovertest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// Sockets and options that only Linux has.

func init() { proctest.Role("answer-all", AnswerAll) }

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

// In cloudflare/tableflip v1.2.3 the last listener overwrites the others. With
// SO_REUSEPORT each has a queue of its own, which is lost with it. That they can be bound
// shows that Control is applied.
func TestListenReusePort(t *testing.T) {
	env := []string{""}
	upg, s := NewParent(t, tableflip.Options{ListenConfig: reusePort}, "answer-all", env...)
	ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "127.0.0.1:0"))
	packets := proctest.Opened[net.PacketConn](t)(upg.ListenPacket("udp", "127.0.0.1:0"))
	tcp, udp := ln.Addr().String(), packets.LocalAddr().String()
	env[0] = proctest.WithArg("tcp " + tcp + "\nudp " + udp)
	listeners := []net.Listener{ln}
	for range 2 {
		listeners = append(listeners, proctest.Opened[net.Listener](t)(upg.Listen("tcp", tcp)))
		proctest.Opened[net.PacketConn](t)(upg.ListenPacket("udp", udp))
		env[0] += "\ntcp " + tcp + "\nudp " + udp
	}
	// The kernel spreads them over the queues.
	waiting := proctest.Dial(t, 30, ln.Addr())
	var want []string
	for i := range 30 {
		client := proctest.Opened[net.Conn](t)(net.Dial("udp", udp))
		proctest.Must(fmt.Fprint(client, i))
		want = append(want, strconv.Itoa(i))
	}
	Upgrade(t, upg)
	for _, ln := range listeners {
		ln.Close()
	}
	for _, got := range proctest.Answers(t, waiting) {
		if got == "" {
			t.Error("a connection was lost")
		}
	}
	var got []string
	for range want {
		var index, text string
		fmt.Sscan(s.Await("datagram").Text, &index, &text)
		got = append(got, text)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("received %q, want %q", got, want)
	}
}

func TestListenControl(t *testing.T) {
	broken := errors.New("broken")
	upg := NewUpgrader(t, tableflip.Options{ListenConfig: &net.ListenConfig{
		Control: func(string, string, syscall.RawConn) error { return broken },
	}})
	proctest.WantError(t, "Listen", proctest.ErrorOf(upg.Listen("tcp", "localhost:0")), broken)
	proctest.WantError(t, "ListenPacket", proctest.ErrorOf(upg.ListenPacket("udp", "localhost:0")), broken)
}

// In cloudflare/tableflip v1.2.3 the name that the kernel gives to a socket without one
// cannot be used to claim it.
func TestListenAutobound(t *testing.T) {
	env := []string{""}
	upg, s := NewParent(t, tableflip.Options{}, "answer-all", env...)
	var listeners []net.Listener
	var waiting []net.Conn
	for range 2 {
		ln := proctest.Opened[net.Listener](t)(upg.Listen("unix", ""))
		listeners = append(listeners, ln)
		waiting = append(waiting, proctest.Dial(t, 1, ln.Addr())...)
	}
	packets := proctest.Opened[net.PacketConn](t)(upg.ListenPacket("unixgram", ""))
	client := proctest.Opened[net.Conn](t)(net.Dial("unixgram", packets.LocalAddr().String()))
	proctest.Must(fmt.Fprint(client, "hello"))
	env[0] = proctest.WithArg("unix " + listeners[1].Addr().String() + "\nunix \nunixgram " + packets.LocalAddr().String())
	Upgrade(t, upg)
	for _, ln := range listeners {
		ln.Close()
	}
	if got := proctest.Answers(t, waiting); got[0] != "1" || got[1] != "0" {
		t.Errorf("the answers are %q, want the second listener to be claimed first", got)
	}
	if m := s.Await("datagram"); m.Text != "2 hello" {
		t.Errorf("received %q", m.Text)
	}
}

func TestListenAbstract(t *testing.T) {
	abstract := fmt.Sprint("@tableflip test ", rand.Uint64())
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg, s := NewParent(t, tableflip.Options{}, "answer-all",
		proctest.WithArg("unix "+abstract+"\nunixpacket "+path+"\nunixgram "+abstract+" gram"))
	var waiting []net.Conn
	for _, socket := range [][2]string{{"unix", abstract}, {"unixpacket", path}} {
		ln := proctest.Opened[net.Listener](t)(upg.Listen(socket[0], socket[1]))
		defer ln.Close()
		waiting = append(waiting, proctest.Dial(t, 1, ln.Addr())...)
	}
	proctest.Opened[net.PacketConn](t)(upg.ListenPacket("unixgram", abstract+" gram"))
	client := proctest.Opened[net.Conn](t)(net.Dial("unixgram", abstract+" gram"))
	proctest.Must(fmt.Fprint(client, "hello"))
	Upgrade(t, upg)
	if got := proctest.Answers(t, waiting[:1]); got[0] != "0" {
		t.Errorf("the abstract socket answers %q", got)
	}
	answer := make([]byte, 10)
	waiting[1].SetDeadline(time.Now().Add(proctest.Patience))
	if n, err := waiting[1].Read(answer); string(answer[:n]) != "1" {
		t.Errorf("the sequenced-packet socket answers %q, %v", answer[:n], err)
	}
	if m := s.Await("datagram"); m.Text != "2 hello" {
		t.Errorf("received %q", m.Text)
	}
}

// An abstract socket has no file, not even one that has its name.
func TestSocketFileAbstract(t *testing.T) {
	t.Chdir(proctest.SocketDir(t))
	abstract := fmt.Sprint("@tableflip test ", rand.Uint64())
	proctest.Opened[net.Listener](t)(net.Listen("unix", "./"+abstract))
	upg := NewUpgrader(t, tableflip.Options{})
	ln := proctest.Opened[net.Listener](t)(upg.Listen("unix", abstract))
	ln.Close()
	upg.Stop()
	if !proctest.Exists(abstract) {
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
		return proctest.Must(unix.GetsockoptInt(int(fd), level, name))
	}
	raw := proctest.Must(conn.(*net.TCPConn).SyscallConn())
	proctest.Must(0, raw.Control(func(fd uintptr) {
		if option(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE) == 0 {
			parameters = "0"
			return
		}
		parameters = fmt.Sprint("1 ", option(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE), " ",
			option(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL), " ", option(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT))
	}))
	return parameters
}

func TestKeepAlive(t *testing.T) {
	for i, test := range keepAlives {
		t.Run(test.story, func(t *testing.T) {
			upg, s := NewParent(t, tableflip.Options{ListenConfig: &test.config}, "keep-alive", proctest.WithArg(strconv.Itoa(i)))
			ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
			proctest.Dial(t, 1, ln.Addr())
			if got := keepAliveOf(proctest.Opened[net.Conn](t)(ln.Accept())); got != test.want {
				t.Errorf("the parent's connection has %s, want %s", got, test.want)
			}
			proctest.Dial(t, 2, ln.Addr())
			Upgrade(t, upg)
			for _, method := range []string{"Accept", "AcceptTCP"} {
				if m := s.Await(method); m.Text != test.want {
					t.Errorf("a connection of the child's %s has %s, want %s", method, m.Text, test.want)
				}
			}
		})
	}
}

func init() {
	proctest.Role("keep-alive", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{ListenConfig: &keepAlives[proctest.Must(strconv.Atoi(proctest.Arg()))].config}))
		ln := proctest.Must(upg.Listen("tcp", "localhost:0"))
		MustBeReady(upg)
		proctest.Report("Accept", keepAliveOf(proctest.Must(ln.Accept())))
		proctest.Report("AcceptTCP", keepAliveOf(proctest.Must(ln.(interface {
			AcceptTCP() (*net.TCPConn, error)
		}).AcceptTCP())))
		ln.Close()
		if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
			panic(err)
		}
	})
}

// Programs look for the net package's own types.
func TestInheritTypes(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg, s := NewParent(t, tableflip.Options{}, "types", proctest.WithArg(path))
	proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	proctest.Opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0"))
	server, _ := proctest.Connect(t)
	proctest.OK(t, upg.AddConn("tcp", "a", server))
	Upgrade(t, upg)
	if got, want := s.Await("types").Text, "*net.TCPListener *net.UnixListener *net.UDPConn *net.TCPConn"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func init() {
	proctest.Role("types", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Report("types", fmt.Sprintf("%T %T %T %T", proctest.Must(upg.Listen("tcp", "localhost:0")),
			proctest.Must(upg.Listen("unix", proctest.Arg())), proctest.Must(upg.ListenPacket("udp", "localhost:0")), proctest.Must(upg.Conn("tcp", "a"))))
		MustBeReady(upg)
	})
}
