//go:build unix

package tableflip_test

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
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
)

// The sockets of socket activation, in the first generation and those after it.

// activate starts a first generation with files as LISTEN_FDS. Variables in env
// replace, or add to, those that systemd would set. The caller keeps files.
func activate(t *testing.T, cmd *exec.Cmd, files []*os.File, env ...string) {
	t.Helper()
	cmd.Env = append(cmd.Env, fmt.Sprintf("LISTEN_FDS=%d", len(files)))
	cmd.Env = append(cmd.Env, env...)
	cmd.Args = []string{"sh", "-c", `LISTEN_PID=$$ exec "$0"`, cmd.Path}
	cmd.Path = "/bin/sh"
	cmd.ExtraFiles = files
	require(t, cmd.Start())
	reaped := inBackground(cmd.Wait)
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-reaped
	})
}

func named(names ...string) string { return "LISTEN_FDNAMES=" + strings.Join(names, ":") }

// fileOf returns a duplicate of socket that stays open until the end of the test.
func fileOf(t *testing.T, socket any) *os.File {
	t.Helper()
	return opened[*os.File](t)(socket.(interface{ File() (*os.File, error) }).File())
}

func init() {
	// claim does what the lines of its argument say, most of which are KIND NETWORK
	// ADDRESS, and reports what it found.
	roles["claim"] = func() {
		logger, logbook := newLogger()
		upg, err := tableflip.New(tableflip.Options{Logger: logger})
		if err != nil {
			_, again := tableflip.New(tableflip.Options{})
			report("New", err, again)
			untilKilled()
		}
		report("variables", slices.DeleteFunc(os.Environ(), func(variable string) bool {
			return !strings.HasPrefix(variable, "LISTEN_")
		}))
		for line := range strings.SplitSeq(arg(), "\n") {
			report("done", line, "is", doClaim(upg, line))
		}
		for len(logbook) > 0 {
			report("log", <-logbook)
		}
		untilKilled()
	}
}

func doClaim(upg *tableflip.Upgrader, line string) any {
	do, name, _ := strings.Cut(line, " ")
	network, addr, _ := strings.Cut(name, " ")
	switch do {
	case "listener":
		if ln := must(upg.Listener(network, addr)); ln != nil {
			return ln.Addr()
		}
	case "packet":
		if conn := must(upg.PacketConn(network, addr)); conn != nil {
			return conn.LocalAddr()
		}
	case "conn":
		if conn := must(upg.Conn(network, addr)); conn != nil {
			return conn.LocalAddr()
		}
	case "file":
		if file := must(upg.File(name)); file != nil {
			return string(must(io.ReadAll(file)))
		}
	case "remove":
		return upg.RemoveListener(network, addr)
	case "ready":
		return upg.Ready()
	case "stop":
		upg.Stop()
	case "subprocess":
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), roleVariable+"=subprocess")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		return cmd.Run()
	default:
		panic(line)
	}
	return "none"
}

// expectDone checks the result of the next line of claim's argument.
func (s *service) expectDone(line, result string) {
	s.t.Helper()
	if got, want := s.await("done").text, line+" is "+result; got != want {
		s.t.Errorf("%s, want %s", got, want)
	}
}

// A spelling is what a service asks for, with PORT and NEXT for port numbers.
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

// A service asks for its sockets in its own words.
func TestActivatedSocketsAreFoundInEverySpelling(t *testing.T) {
	dir := socketDir(t)
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
			[]string{"listener tcp 127.0.0.77:http", "listener tcp 127.0.0.77:80", "listener tcp4 127.0.0.77:http"}, nil},
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
			s := newService(t)
			cmd := s.command("claim", withArg(strings.Join(lines, "\n")))
			cmd.Dir = dir
			cmd.Path, _ = os.Executable()
			activate(t, cmd, files)
			for _, spelling := range all {
				want := "none"
				if spelling.found {
					want = addr.String()
				}
				s.expectDone(spelling.ask, want)
			}
		})
	}
}

// systemd can bind an IPv6 socket to an IPv4 address.
func TestActivatedSocketOfAMappedAddress(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	require(t, err)
	socket := opened[*os.File](t)(os.NewFile(uintptr(fd), "socket"), nil)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
		t.Skip(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet6{Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()}); err != nil {
		t.Skip(err)
	}
	require(t, unix.Listen(fd, 1))
	bound, err := unix.Getsockname(fd)
	require(t, err)
	addr := fmt.Sprint("127.0.0.1:", bound.(*unix.SockaddrInet6).Port)
	s := newService(t)
	activate(t, s.command("claim", withArg("listener tcp4 "+addr)), []*os.File{socket})
	s.expectDone("listener tcp4 "+addr, addr)
}

// An address as it was asked for goes before one that is as good.
func TestActivatedSocketIsTheOneAskedFor(t *testing.T) {
	v4 := opened[net.Listener](t)(net.Listen("tcp4", "0.0.0.0:0"))
	_, port, _ := net.SplitHostPort(v4.Addr().String())
	v6, err := net.Listen("tcp6", "[::]:"+port)
	if err != nil {
		t.Skip(err)
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
		s := newService(t)
		ask := "listener tcp " + test.host + ":" + port
		files := map[string]*os.File{"v4": fileOf(t, v4), "v6": fileOf(t, v6)}
		activate(t, s.command("claim", withArg(ask)), []*os.File{files[test.first], files[test.second]})
		s.expectDone(ask, test.want.Addr().String())
	}
}

func TestActivatedDescriptorsAreFoundByTheirNames(t *testing.T) {
	listen := func() net.Listener { return opened[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0")) }
	first, second, third := listen(), listen(), listen()
	packet := opened[net.PacketConn](t)(net.ListenPacket("udp", "127.0.0.1:0"))
	server, _ := connect(t)
	file := opened[*os.File](t)(os.Open(writeProgram(t, []byte("content"), 0o600)))
	fifoRead, fifoWrite, err := os.Pipe()
	require(t, err)
	defer fifoRead.Close()
	must(io.WriteString(fifoWrite, "from a pipe"))
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
	s := newService(t)
	activate(t, s.command("claim", withArg(strings.Join(lines, "\n"))),
		[]*os.File{fileOf(t, first), fileOf(t, second), fileOf(t, third), fileOf(t, packet), fileOf(t, server), file, fifoRead},
		named("web", "web", "", "web", "web", "web", "web"))
	for _, a := range ask {
		s.expectDone(a.ask, a.want)
	}
}

func TestVariablesOfSocketActivation(t *testing.T) {
	ln := opened[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
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
			s := newService(t)
			cmd := s.command("claim", withArg(ask))
			activate(t, cmd, []*os.File{fileOf(t, ln)}, test.env...)
			if got := s.await("variables").text; got != "[]" {
				t.Errorf("left in the environment: %s", got)
			}
			s.expectDone(ask, test.want)
		})
	}
	t.Run("of another process", func(t *testing.T) {
		s := newService(t)
		cmd := s.command("claim", withArg(ask), "LISTEN_PID=1", "LISTEN_FDS=1", "LISTEN_FDNAMES=web")
		cmd.ExtraFiles = []*os.File{fileOf(t, ln)}
		require(t, cmd.Start())
		defer cmd.Wait()
		defer cmd.Process.Kill()
		if got := s.await("variables").text; got != "[LISTEN_PID=1 LISTEN_FDS=1 LISTEN_FDNAMES=web]" {
			t.Errorf("left in the environment: %s", got)
		}
		s.expectDone(ask, "none")
	})
	for name, test := range map[string]struct{ env, want string }{
		"garbled":          {"LISTEN_FDS=two", "unset it and LISTEN_PID"},
		"negative":         {"LISTEN_FDS=-1", "unset it and LISTEN_PID"},
		"more than passed": {"LISTEN_FDS=1000", "of the 1000 that LISTEN_FDS announces"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t)
			activate(t, s.command("claim", withArg(ask)), []*os.File{fileOf(t, ln)}, test.env)
			if got := s.await("New").text; strings.Count(got, test.want) != 2 {
				t.Errorf("New and New again: %s", got)
			}
		})
	}
}

// What the socket unit has bound is the socket unit's to unlink, claimed or not.
func TestActivatedUnixSocketsStay(t *testing.T) {
	dir := socketDir(t)
	claimed, unclaimed := filepath.Join(dir, "claimed"), filepath.Join(dir, "unclaimed")
	var files []*os.File
	for _, path := range []string{claimed, unclaimed} {
		ln := must(net.Listen("unix", path)).(*net.UnixListener)
		ln.SetUnlinkOnClose(false)
		files = append(files, must(ln.File()))
		ln.Close()
	}
	s := newService(t)
	activate(t, s.command("claim", withArg("listener unix "+claimed+"\nready\nstop")), files, named("a", "b.socket"))
	for _, file := range files {
		file.Close()
	}
	s.expectDone("listener unix "+claimed, claimed)
	s.expectDone("ready", "<nil>")
	requireRefused(t, "unclaimed", "unix", unclaimed)
	s.expectDone("stop", "none")
	if line := s.await("log").text; !strings.Contains(line, "nobody claimed") || !strings.Contains(line, "listener:systemd:b.socket") {
		t.Errorf("the log says %s", line)
	}
	if !exists(claimed) || !exists(unclaimed) {
		t.Error("a socket unit's file is gone")
	}
}

func TestActivatedListenerIsRemovedByTheNameOfItsClaim(t *testing.T) {
	for _, network := range []string{"tcp", "systemd"} {
		for _, early := range []bool{true, false} {
			t.Run(fmt.Sprint(network, early), func(t *testing.T) {
				ln := must(net.Listen("tcp", "127.0.0.1:0"))
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
				s := newService(t)
				activate(t, s.command("claim", withArg(strings.Join(lines, "\n"))), []*os.File{file}, named("web"))
				results := map[string]string{"listener": ln.Addr().String(), "ready": "<nil>", "remove": "<nil>"}
				for _, line := range lines[:3] {
					do, _, _ := strings.Cut(line, " ")
					s.expectDone(line, results[do])
				}
				if got := s.await("done").text; !strings.Contains(got, os.ErrNotExist.Error()) {
					t.Errorf("it can be removed again: %s", got)
				}
			})
		}
	}
}

func TestSubprocessesOfAnActivatedServiceInheritNothing(t *testing.T) {
	ln := opened[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	s := newService(t)
	activate(t, s.command("claim", withArg("listener systemd web\nsubprocess\nready\nsubprocess")), []*os.File{fileOf(t, ln)}, named("web"))
	if got := s.await("variables").text; got != "[]" {
		t.Errorf("left in the environment: %s", got)
	}
	for range 2 {
		if got := s.await("subprocess").text; !strings.HasPrefix(got, "false ") || strings.Contains(got, "socket:") {
			t.Errorf("a subprocess has %s", got)
		}
	}
}

// Whichever name one generation uses, the next may use the other.
func TestActivatedSocketsTravelThroughUpgrades(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	for name, generations := range map[string][]string{
		"address, name, address": {"tcp :PORT", "systemd web", "tcp *:PORT"},
		"name, address, name":    {"systemd web", "tcp [::]:PORT", "systemd web"},
		"two addresses":          {"tcp 0.0.0.0:PORT", "tcp :PORT", "tcp4 :PORT"},
		"Unix":                   {"unix " + path, "systemd web", "unix " + path},
	} {
		t.Run(name, func(t *testing.T) {
			var ln net.Listener
			port := ""
			if name == "Unix" {
				ln = must(net.Listen("unix", path))
				ln.(*net.UnixListener).SetUnlinkOnClose(false)
			} else {
				ln = must(net.Listen("tcp", ":0"))
				_, port, _ = net.SplitHostPort(ln.Addr().String())
			}
			file := must(ln.(interface{ File() (*os.File, error) }).File())
			defer file.Close()
			ln.Close()
			s := newService(t)
			activate(t, s.command("travel", withArg(strings.ReplaceAll(strings.Join(generations, "\n"), "PORT", port))), []*os.File{file}, named("web"))
			last := s.await("serving")
			addr := "localhost:" + port
			if name == "Unix" {
				addr = path
			}
			if got := answerOf(t, ln.Addr().Network(), addr); got != strconv.Itoa(last.pid) {
				t.Errorf("the answer is %q, want %d", got, last.pid)
			}
			s.await("stopped")
			if name == "Unix" && !exists(path) {
				t.Error("the socket unit's file is gone")
			}
			s.awaitEnd()
		})
	}
}

func init() {
	// travel claims what the first line says, and leaves the others to its children.
	// The last serves once.
	roles["travel"] = func() {
		this, rest, more := strings.Cut(arg(), "\n")
		upg := must(tableflip.New(tableflip.Options{Command: func(cmd *exec.Cmd) {
			cmd.Env = append(cmd.Env, withArg(rest))
		}}))
		network, addr, _ := strings.Cut(this, " ")
		ln := must(upg.Listener(network, addr))
		if ln == nil {
			panic("nothing inherited as " + this)
		}
		mustBeReady(upg)
		must(0, upg.WaitForParent(context.Background()))
		if more {
			must(0, upg.Upgrade())
			return
		}
		report("serving")
		conn := must(ln.Accept())
		must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
		conn.Close()
		upg.Stop()
		report("stopped")
	}
}

// sameSocket reports whether both are descriptors of one socket.
func sameSocket(t *testing.T, a, b syscall.Conn) bool {
	t.Helper()
	var stats [2]unix.Stat_t
	for i, conn := range []syscall.Conn{a, b} {
		raw, err := conn.SyscallConn()
		require(t, err)
		require(t, raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &stats[i]) }))
		require(t, err)
	}
	return stats[0].Dev == stats[1].Dev && stats[0].Ino == stats[1].Ino
}

// FuzzStoreName shows that names are arbitrary bytes, and that what systemd gets is
// what sd_notify(3) allows.
func FuzzStoreName(f *testing.F) {
	f.Add("listener", "tcp", ":8080", "LISTEN")
	f.Add("", "", "", "tableflip,a,b,c")
	f.Add("packet", "unixgram", "/run/a b,c%;:\x00\xff", "tableflip,%,,")
	f.Add("a,b", "tableflip,", "%2C", "tableflip,a,b")
	f.Fuzz(func(t *testing.T, kind, network, addr, other string) {
		fdName := tableflip.StoreName(kind, network, addr)
		if i := strings.IndexFunc(fdName, func(r rune) bool { return r <= ' ' || r > '~' || r == ':' }); i >= 0 {
			t.Errorf("systemd refuses %q", fdName)
		}
		if k, n, a, ok := tableflip.ParseStoreName(fdName); k != kind || n != network || a != addr || !ok {
			t.Errorf("%q, %q, %q became %q, %q, %q, %v", kind, network, addr, k, n, a, ok)
		}
		// Of others' names it need only survive.
		if k, n, a, ok := tableflip.ParseStoreName(other); ok && !strings.HasPrefix(other, "tableflip,") {
			t.Errorf("%q was taken for %q, %q, %q", other, k, n, a)
		}
	})
}
