//go:build unix

package handovertest

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// The sockets of socket activation, in the first generation and those after it.

// activate starts a first generation with files as LISTEN_FDS. Variables in env
// replace, or add to, those that systemd would set. The caller keeps files.
func activate(s *proctest.Service, cmd *exec.Cmd, files []*os.File, env ...string) {
	cmd.Env = append(cmd.Env, fmt.Sprintf("LISTEN_FDS=%d", len(files)))
	cmd.Env = append(cmd.Env, env...)
	cmd.Args = []string{"sh", "-c", `LISTEN_PID=$$ exec "$0"`, cmd.Path}
	cmd.Path = "/bin/sh"
	cmd.ExtraFiles = files
	s.Start(cmd)
}

func named(names ...string) string { return "LISTEN_FDNAMES=" + strings.Join(names, ":") }

// fileOf returns a duplicate of socket that stays open until the end of the test.
func fileOf(t *testing.T, socket any) *os.File {
	t.Helper()
	return proctest.Opened[*os.File](t)(socket.(interface{ File() (*os.File, error) }).File())
}

func init() {
	// claim does what the lines of its argument say, most of which are KIND NETWORK
	// ADDRESS, and reports what it found.
	proctest.Role("claim", func() {
		logger, logbook := proctest.NewLogger()
		upg, err := tableflip.New(tableflip.Options{Logger: logger})
		if err != nil {
			_, again := tableflip.New(tableflip.Options{})
			proctest.Report("New", err, again)
			proctest.UntilKilled()
		}
		proctest.Report("variables", slices.DeleteFunc(os.Environ(), func(variable string) bool {
			return !strings.HasPrefix(variable, "LISTEN_")
		}))
		for line := range strings.SplitSeq(proctest.Arg(), "\n") {
			proctest.Report("done", line, "is", doClaim(upg, line))
		}
		for len(logbook) > 0 {
			proctest.Report("log", <-logbook)
		}
		proctest.UntilKilled()
	})
}

func doClaim(upg *tableflip.Upgrader, line string) any {
	do, name, _ := strings.Cut(line, " ")
	network, addr, _ := strings.Cut(name, " ")
	switch do {
	case "listener":
		if ln := proctest.Must(upg.Listener(network, addr)); ln != nil {
			return ln.Addr()
		}
	case "packet":
		if conn := proctest.Must(upg.PacketConn(network, addr)); conn != nil {
			return conn.LocalAddr()
		}
	case "conn":
		if conn := proctest.Must(upg.Conn(network, addr)); conn != nil {
			return conn.LocalAddr()
		}
	case "file":
		if file := proctest.Must(upg.File(name)); file != nil {
			return string(proctest.Must(io.ReadAll(file)))
		}
	case "remove":
		return upg.RemoveListener(network, addr)
	case "ready":
		return upg.Ready()
	case "stop":
		upg.Stop()
	case "subprocess":
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), proctest.Environment("subprocess"))
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		return cmd.Run()
	default:
		panic(line)
	}
	return "none"
}

// wantDone checks the result of the next line of claim's argument.
func wantDone(t *testing.T, s *proctest.Service, line, result string) {
	t.Helper()
	if got, want := s.Await("done").Text, line+" is "+result; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// A spelling is an address that a service asks for, with PORT and NEXT for port numbers.
type spelling struct {
	ask   string
	found bool
}

func spellings(found, missed []string) []spelling {
	var all []spelling
	for _, ask := range missed {
		all = append(all, spelling{ask, false})
	}
	for _, ask := range found {
		all = append(all, spelling{ask, true})
	}
	return all
}

// A service may spell the addresses of its sockets as it likes.
func TestActivatedSpellings(t *testing.T) {
	dir := proctest.SocketDir(t)
	path := filepath.Join(dir, "s")
	never := []string{
		"listener tcp :NEXT", "listener udp :PORT", "packet tcp :PORT", "conn tcp :PORT", "listener unix :PORT",
		"listener tcp PORT", "listener tcp :0", "listener tcp :nonsense", "listener tcp example.com:PORT", "listener sctp :PORT",
	}
	for _, test := range []struct {
		name          string
		network, addr string
		found, missed []string
	}{
		{"all of IPv4", "tcp4", "0.0.0.0:0",
			[]string{"listener tcp :PORT", "listener tcp 0.0.0.0:PORT", "listener tcp [::]:PORT", "listener tcp *:PORT", "listener tcp4 :PORT", "listener tcp [::ffff:0.0.0.0]:PORT"},
			[]string{"listener tcp6 :PORT", "listener tcp 127.0.0.1:PORT", "listener tcp localhost:PORT"}},
		{"all", "tcp", "[::]:0",
			[]string{"listener tcp :PORT", "listener tcp 0.0.0.0:PORT", "listener tcp [::]:PORT", "listener tcp *:PORT", "listener tcp4 :PORT", "listener tcp6 :PORT"},
			[]string{"listener tcp [::1]:PORT", "listener tcp localhost:PORT"}},
		{"all of IPv6", "tcp6", "[::]:0",
			[]string{"listener tcp :PORT", "listener tcp 0.0.0.0:PORT", "listener tcp [::]:PORT", "listener tcp6 *:PORT"},
			[]string{"listener tcp4 :PORT", "listener tcp4 0.0.0.0:PORT", "listener tcp [::1]:PORT"}},
		{"IPv4 loopback", "tcp4", "127.0.0.1:0",
			[]string{"listener tcp 127.0.0.1:PORT", "listener tcp4 localhost:PORT", "listener tcp localhost:PORT", "listener tcp [::ffff:127.0.0.1]:PORT"},
			[]string{"listener tcp :PORT", "listener tcp 127.0.0.2:PORT", "listener tcp [::1]:PORT", "listener tcp6 localhost:PORT"}},
		{"IPv6 loopback", "tcp6", "[::1]:0",
			[]string{"listener tcp [::1]:PORT", "listener tcp [0:0:0:0:0:0:0:1]:PORT", "listener tcp localhost:PORT", "listener tcp6 localhost:PORT"},
			[]string{"listener tcp :PORT", "listener tcp 127.0.0.1:PORT", "listener tcp4 localhost:PORT"}},
		{"named port", "tcp4", "127.0.0.77:80",
			[]string{"listener tcp 127.0.0.77:http", "listener tcp 127.0.0.77:80", "listener tcp4 127.0.0.77:http"},
			[]string{"listener tcp localhost:80"}},
		{"UDP", "udp4", "0.0.0.0:0",
			[]string{"packet udp :PORT", "packet udp4 0.0.0.0:PORT"},
			[]string{"packet udp6 :PORT", "packet tcp :PORT", "listener udp :PORT", "packet unixgram :PORT"}},
		{"Unix", "unix", path,
			[]string{"listener unix " + path, "listener unix s"},
			[]string{"listener unixpacket " + path, "listener unix ", "listener unix t", "listener unix @s", "packet unixgram " + path}},
		{"Unix datagrams", "unixgram", path + "gram",
			[]string{"packet unixgram " + path + "gram", "packet unixgram sgram"},
			[]string{"packet unix " + path + "gram", "packet unixgram "}},
		{"Unix packets", "unixpacket", path + "packet",
			[]string{"listener unixpacket " + path + "packet"},
			[]string{"listener unix " + path + "packet"}},
		{"abstract", "unix", "@" + path,
			[]string{"listener unix @" + path},
			[]string{"listener unix " + path, "listener unix @"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var socket any
			var addr net.Addr
			var err error
			if strings.HasPrefix(test.network, "udp") || test.network == "unixgram" {
				var conn net.PacketConn
				if conn, err = net.ListenPacket(test.network, test.addr); err == nil {
					defer conn.Close()
					socket, addr = conn, conn.LocalAddr()
				}
			} else {
				var ln net.Listener
				if ln, err = net.Listen(test.network, test.addr); err == nil {
					defer ln.Close()
					socket, addr = ln, ln.Addr()
				}
			}
			if err != nil {
				t.Skip("this system has no such socket: ", err)
			}
			_, port, _ := net.SplitHostPort(addr.String())
			number, _ := strconv.Atoi(port)
			missed := test.missed
			if strings.HasPrefix(test.network, "tcp") {
				missed = append(never, missed...)
			}
			all := spellings(test.found, missed)
			all = append(all, spelling{test.found[0], false}) // all are taken
			var lines []string
			for i, s := range all {
				all[i].ask = strings.NewReplacer("PORT", port, "NEXT", strconv.Itoa(number+1)).Replace(s.ask)
				lines = append(lines, all[i].ask)
			}
			// Each that finds one takes it.
			var files []*os.File
			for range test.found {
				files = append(files, fileOf(t, socket))
			}
			s := proctest.NewService(t)
			cmd := s.Command("claim", proctest.WithArg(strings.Join(lines, "\n")))
			cmd.Dir = dir
			cmd.Path, _ = os.Executable()
			activate(s, cmd, files)
			for _, spelling := range all {
				want := "none"
				if spelling.found {
					want = addr.String()
				}
				wantDone(t, s, spelling.ask, want)
			}
		})
	}
}

// systemd can bind an IPv6 socket to an IPv4 address.
func TestActivatedMapped(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	proctest.OK(t, err)
	socket := proctest.Opened[*os.File](t)(os.NewFile(uintptr(fd), "socket"), nil)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
		t.Skip("IPv6 sockets have no IPv4 addresses here, as on OpenBSD: ", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet6{Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()}); err != nil {
		t.Skip("IPv6 sockets have no IPv4 addresses here: ", err)
	}
	proctest.OK(t, unix.Listen(fd, 1))
	bound, err := unix.Getsockname(fd)
	proctest.OK(t, err)
	addr := fmt.Sprint("127.0.0.1:", bound.(*unix.SockaddrInet6).Port)
	s := proctest.NewService(t)
	activate(s, s.Command("claim", proctest.WithArg("listener tcp4 "+addr)), []*os.File{socket})
	wantDone(t, s, "listener tcp4 "+addr, addr)
}

// An address that matches exactly comes before one that is only equivalent.
func TestActivatedExact(t *testing.T) {
	v4 := proctest.Opened[net.Listener](t)(net.Listen("tcp4", "0.0.0.0:0"))
	_, port, _ := net.SplitHostPort(v4.Addr().String())
	v6, err := net.Listen("tcp6", "[::]:"+port)
	if err != nil {
		t.Skip("no such port of both families: ", err)
	}
	defer v6.Close()
	for _, test := range []struct {
		host, first, second string
		want                net.Listener
	}{
		{"", "v6", "v4", v4},
		{"*", "v6", "v4", v4},
		{"0.0.0.0", "v6", "v4", v4},
		{"[::]", "v4", "v6", v6},
	} {
		s := proctest.NewService(t)
		ask := "listener tcp " + test.host + ":" + port
		files := map[string]*os.File{"v4": fileOf(t, v4), "v6": fileOf(t, v6)}
		activate(s, s.Command("claim", proctest.WithArg(ask)), []*os.File{files[test.first], files[test.second]})
		wantDone(t, s, ask, test.want.Addr().String())
	}
}

func TestActivatedNames(t *testing.T) {
	listen := func() net.Listener { return proctest.Opened[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0")) }
	first, second, third := listen(), listen(), listen()
	packet := proctest.Opened[net.PacketConn](t)(net.ListenPacket("udp", "127.0.0.1:0"))
	server, _ := proctest.Connect(t)
	file := proctest.Opened[*os.File](t)(os.Open(writeProgram(t, []byte("content"), 0o600)))
	fifoRead, fifoWrite, err := os.Pipe()
	proctest.OK(t, err)
	defer fifoRead.Close()
	proctest.Must(io.WriteString(fifoWrite, "from a pipe"))
	fifoWrite.Close()
	ask := []struct{ ask, want string }{
		{"listener systemd web", first.Addr().String()},
		{"listener systemd web", second.Addr().String()},
		{"listener systemd web", "none"},
		{"listener systemd unknown", third.Addr().String()},
		{"packet systemd web", packet.LocalAddr().String()},
		{"conn systemd web", server.LocalAddr().String()},
		{"file web", "content"},
		{"file web", "from a pipe"},
		{"listener systemd nobody", "none"},
		{"file nobody", "none"},
	}
	var lines []string
	for _, a := range ask {
		lines = append(lines, a.ask)
	}
	s := proctest.NewService(t)
	activate(s, s.Command("claim", proctest.WithArg(strings.Join(lines, "\n"))),
		[]*os.File{fileOf(t, first), fileOf(t, second), fileOf(t, third), fileOf(t, packet), fileOf(t, server), file, fifoRead},
		named("web", "web", "", "web", "web", "web", "web"))
	for _, a := range ask {
		wantDone(t, s, a.ask, a.want)
	}
}

func TestActivatedVariables(t *testing.T) {
	ln := proctest.Opened[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	const ask = "listener systemd unknown"
	for _, test := range []struct {
		name string
		env  []string
		want string
	}{
		{name: "no names", env: []string{"LISTEN_PIDFDID=7"}, want: ln.Addr().String()},
		{name: "fewer names", env: []string{"LISTEN_FDNAMES="}, want: ln.Addr().String()},
		{name: "none", env: []string{"LISTEN_FDS=0"}, want: "none"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := proctest.NewService(t)
			cmd := s.Command("claim", proctest.WithArg(ask))
			activate(s, cmd, []*os.File{fileOf(t, ln)}, test.env...)
			if got := s.Await("variables").Text; got != "[]" {
				t.Errorf("left in the environment: %s", got)
			}
			wantDone(t, s, ask, test.want)
		})
	}
	t.Run("of another process", func(t *testing.T) {
		s := proctest.NewService(t)
		cmd := s.Command("claim", proctest.WithArg(ask), "LISTEN_PID=1", "LISTEN_FDS=1", "LISTEN_FDNAMES=web")
		cmd.ExtraFiles = []*os.File{fileOf(t, ln)}
		s.Start(cmd)
		if got := s.Await("variables").Text; got != "[LISTEN_PID=1 LISTEN_FDS=1 LISTEN_FDNAMES=web]" {
			t.Errorf("left in the environment: %s", got)
		}
		wantDone(t, s, ask, "none")
	})
	for _, test := range []struct{ name, env, want string }{
		{"garbled", "LISTEN_FDS=two", "unset it and LISTEN_PID"},
		{"negative", "LISTEN_FDS=-1", "unset it and LISTEN_PID"},
		{"more than passed", "LISTEN_FDS=1000", "of the 1000 that LISTEN_FDS announces"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := proctest.NewService(t)
			activate(s, s.Command("claim", proctest.WithArg(ask)), []*os.File{fileOf(t, ln)}, test.env)
			if got := s.Await("New").Text; strings.Count(got, test.want) != 2 {
				t.Errorf("New and New again: %s", got)
			}
		})
	}
}

// The file that the socket unit has bound stays, claimed or not: the unit unlinks it.
func TestActivatedUnixStays(t *testing.T) {
	dir := proctest.SocketDir(t)
	claimed, unclaimed := filepath.Join(dir, "claimed"), filepath.Join(dir, "unclaimed")
	var files []*os.File
	for _, path := range []string{claimed, unclaimed} {
		ln := proctest.Must(net.Listen("unix", path)).(*net.UnixListener)
		ln.SetUnlinkOnClose(false)
		files = append(files, proctest.Must(ln.File()))
		ln.Close()
	}
	s := proctest.NewService(t)
	activate(s, s.Command("claim", proctest.WithArg("listener unix "+claimed+"\nready\nlistener unix "+unclaimed+"\nstop")), files, named("a", "b.socket"))
	for _, file := range files {
		file.Close()
	}
	wantDone(t, s, "listener unix "+claimed, claimed)
	wantDone(t, s, "ready", "<nil>")
	proctest.WantRefused(t, "unclaimed", "unix", unclaimed)
	wantDone(t, s, "listener unix "+unclaimed, "none") // no parent serves it, and it can be bound anew
	wantDone(t, s, "stop", "none")
	if line := s.Await("log").Text; !strings.Contains(line, "nobody claimed") || !strings.Contains(line, "listener:systemd:b.socket") {
		t.Errorf("the log says %s", line)
	}
	if !proctest.Exists(claimed) || !proctest.Exists(unclaimed) {
		t.Error("a socket unit's file is gone")
	}
}

func TestActivatedRemove(t *testing.T) {
	for _, network := range []string{"tcp", "systemd"} {
		for _, early := range []bool{true, false} {
			t.Run(fmt.Sprint(network, early), func(t *testing.T) {
				ln := proctest.Must(net.Listen("tcp", "127.0.0.1:0"))
				file := fileOf(t, ln)
				ln.Close()
				name := "systemd web"
				if network == "tcp" {
					name = "tcp " + ln.Addr().String()
				}
				lines := []string{"listener " + name, "ready", "remove " + name, "remove " + name}
				if early {
					lines = []string{"listener " + name, "remove " + name, "ready", "remove " + name}
				}
				s := proctest.NewService(t)
				activate(s, s.Command("claim", proctest.WithArg(strings.Join(lines, "\n"))), []*os.File{file}, named("web"))
				results := map[string]string{"listener": ln.Addr().String(), "ready": "<nil>", "remove": "<nil>"}
				for _, line := range lines[:3] {
					do, _, _ := strings.Cut(line, " ")
					wantDone(t, s, line, results[do])
				}
				if got := s.Await("done").Text; !strings.Contains(got, os.ErrNotExist.Error()) {
					t.Errorf("it can be removed again: %s", got)
				}
			})
		}
	}
}

func TestActivatedSubprocess(t *testing.T) {
	ln := proctest.Opened[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	s := proctest.NewService(t)
	activate(s, s.Command("claim", proctest.WithArg("listener systemd web\nsubprocess\nready\nsubprocess")), []*os.File{fileOf(t, ln)}, named("web"))
	if got := s.Await("variables").Text; got != "[]" {
		t.Errorf("left in the environment: %s", got)
	}
	for range 2 {
		if got := s.Await("subprocess").Text; !strings.HasPrefix(got, "false ") || strings.Contains(got, "socket:") {
			t.Errorf("a subprocess has %s", got)
		}
	}
}

// A socket has two names, and each generation may use either.
func TestActivatedUpgrade(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	for _, test := range []struct {
		name        string
		generations []string
	}{
		{"address, name, address", []string{"tcp :PORT", "systemd web", "tcp *:PORT"}},
		{"name, address, name", []string{"systemd web", "tcp [::]:PORT", "systemd web"}},
		{"two addresses", []string{"tcp 0.0.0.0:PORT", "tcp :PORT", "tcp4 :PORT"}},
		{"Unix", []string{"unix " + path, "systemd web", "unix " + path}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var ln net.Listener
			port := ""
			if test.name == "Unix" {
				ln = proctest.Must(net.Listen("unix", path))
				ln.(*net.UnixListener).SetUnlinkOnClose(false)
			} else {
				ln = proctest.Must(net.Listen("tcp", ":0"))
				_, port, _ = net.SplitHostPort(ln.Addr().String())
			}
			file := proctest.Must(ln.(interface{ File() (*os.File, error) }).File())
			defer file.Close()
			ln.Close()
			s := proctest.NewService(t)
			activate(s, s.Command("travel", proctest.WithArg(strings.ReplaceAll(strings.Join(test.generations, "\n"), "PORT", port))), []*os.File{file}, named("web"))
			last := s.Await("serving")
			addr := "localhost:" + port
			if test.name == "Unix" {
				addr = path
			}
			if got := proctest.Answer(t, ln.Addr().Network(), addr); got != strconv.Itoa(last.PID) {
				t.Errorf("the answer is %q, want %d", got, last.PID)
			}
			s.Await("stopped")
			if test.name == "Unix" && !proctest.Exists(path) {
				t.Error("the socket unit's file is gone")
			}
			s.AwaitEnd()
		})
	}
}

func init() {
	// travel claims what the first line says, and leaves the others to its children.
	// The last serves once.
	proctest.Role("travel", func() {
		this, rest, more := strings.Cut(proctest.Arg(), "\n")
		upg := proctest.Must(tableflip.New(tableflip.Options{Command: func(cmd *exec.Cmd) {
			cmd.Env = append(cmd.Env, proctest.WithArg(rest))
		}}))
		network, addr, _ := strings.Cut(this, " ")
		ln := proctest.Must(upg.Listener(network, addr))
		if ln == nil {
			panic("nothing inherited as " + this)
		}
		MustBeReady(upg)
		proctest.Must(0, upg.WaitForParent(context.Background()))
		if more {
			proctest.Must(0, upg.Upgrade())
			return
		}
		proctest.Report("serving")
		conn := proctest.Must(ln.Accept())
		proctest.Must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
		conn.Close()
		upg.Stop()
		proctest.Report("stopped")
	})
}
