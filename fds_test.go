//go:build unix

package tableflip_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/step"
)

// newUpgrader is for tests that need no child.
func newUpgrader(t *testing.T, opts tableflip.Options) *tableflip.Upgrader {
	t.Helper()
	upg, err := tableflip.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(upg.Stop)
	return upg
}

// opened is for sockets that stay open until the end of the test.
func opened[T io.Closer](t *testing.T) func(T, error) T {
	t.Helper()
	return func(socket T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { socket.Close() })
		return socket
	}
}

// listens drops a socket, that stays open until the garbage collector finds it.
func listens[T any](_ T, err error) error { return err }

func require(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// upgrade is for tests whose upgrades succeed.
func upgrade(t *testing.T, upg *tableflip.Upgrader) {
	t.Helper()
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
}

// requireEOF waits until the other side has closed conn, or is gone.
func requireEOF(t *testing.T, what string, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("%s: read %d bytes, %v, want the end of the connection", what, n, err)
	}
}

// requireOpen shows that conn still reaches a socket at the other end.
func requireOpen(t *testing.T, what string, conn, other net.Conn) {
	t.Helper()
	if _, err := io.WriteString(other, "x"); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	conn.SetReadDeadline(time.Now().Add(patience))
	if n, err := conn.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("%s: read %d bytes, %v", what, n, err)
	}
}

func requireRefused(t *testing.T, what, network, addr string) {
	t.Helper()
	conn, err := net.Dial(network, addr)
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: dial %s %s: %v, want it refused", what, network, addr, err)
	}
}

func init() {
	// answer-all takes the listeners whose networks and addresses it is told,
	// and answers on each of them with its index. It takes packet conns too, from
	// which it reports what it receives.
	roles["answer-all"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		var serve []func()
		for i, line := range strings.Split(arg(), "\n") {
			network, addr, _ := strings.Cut(line, " ")
			if strings.HasPrefix(network, "udp") || network == "unixgram" {
				conn := must(upg.PacketConn(network, addr))
				serve = append(serve, func() {
					datagram := make([]byte, 100)
					for {
						n, _, err := conn.ReadFrom(datagram)
						must(n, err)
						report("datagram", i, string(datagram[:n]))
					}
				})
				continue
			}
			ln := must(upg.Listener(network, addr))
			if ln == nil {
				panic("nothing inherited as " + line)
			}
			serve = append(serve, func() {
				for {
					conn := must(ln.Accept())
					must(io.WriteString(conn, strconv.Itoa(i)))
					conn.Close()
				}
			})
		}
		mustBeReady(upg)
		report("ready")
		for _, serve := range serve {
			go serve()
		}
		untilKilled()
	}
}

// dialAll makes connections that wait to be accepted.
func dialAll(t *testing.T, count int, addr net.Addr) []net.Conn {
	t.Helper()
	var conns []net.Conn
	for range count {
		conns = append(conns, opened[net.Conn](t)(net.Dial(addr.Network(), addr.String())))
	}
	return conns
}

// answers returns what is said on each of conns until it is closed.
func answers(t *testing.T, conns []net.Conn) []string {
	t.Helper()
	var all []string
	for _, conn := range conns {
		conn.SetDeadline(time.Now().Add(patience))
		answer, err := io.ReadAll(conn)
		if err != nil {
			t.Errorf("%v: %v", conn.RemoteAddr(), err)
		}
		all = append(all, string(answer))
	}
	return all
}

// Elsewhere the second listener overwrites the first, which is lost with those who
// wait in its queue.
func TestListenersOnPortZeroAreAllHandedOverWithTheirQueues(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "answer-all",
		withArg("tcp localhost:0\ntcp localhost:0\ntcp localhost:0"))
	var listeners []net.Listener
	var waiting [][]net.Conn
	for range 3 {
		ln := opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
		listeners = append(listeners, ln)
		waiting = append(waiting, dialAll(t, 3, ln.Addr()))
	}
	upgrade(t, upg)
	for _, ln := range listeners {
		ln.Close()
	}
	s.await("ready")
	for i, ln := range listeners {
		waiting[i] = append(waiting[i], dialAll(t, 1, ln.Addr())...)
		for _, got := range answers(t, waiting[i]) {
			if got != strconv.Itoa(i) {
				t.Errorf("listener %d was taken as the one of index %s", i, got)
			}
		}
	}
}

func TestPacketConnsOnPortZeroAreAllHandedOverWithTheirQueues(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "answer-all",
		withArg("udp localhost:0\nudp localhost:0"))
	for i := range 2 {
		conn := opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0"))
		client := opened[net.Conn](t)(net.Dial("udp", conn.LocalAddr().String()))
		if _, err := fmt.Fprint(client, "to ", i); err != nil {
			t.Fatal(err)
		}
	}
	upgrade(t, upg)
	got := []string{s.await("datagram").text, s.await("datagram").text}
	slices.Sort(got)
	if want := []string{"0 to 0", "1 to 1"}; !slices.Equal(got, want) {
		t.Errorf("received %q, want %q", got, want)
	}
}

func TestDatagramsOfAUnixSocketAreHandedOver(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg, s := newParent(t, tableflip.Options{}, "answer-all", withArg("unixgram "+path))
	opened[net.PacketConn](t)(upg.ListenPacket("unixgram", path))
	client := opened[net.Conn](t)(net.Dial("unixgram", path))
	if _, err := fmt.Fprint(client, "early"); err != nil {
		t.Fatal(err)
	}
	upgrade(t, upg)
	if m := s.await("datagram"); m.text != "0 early" {
		t.Errorf("received %q", m.text)
	}
	if _, err := fmt.Fprint(client, "late"); err != nil {
		t.Fatal(err)
	}
	if m := s.await("datagram"); m.text != "0 late" {
		t.Errorf("received %q", m.text)
	}
}

// Elsewhere (on its main branch) each generation binds another port.
func TestPortZeroKeepsItsPortOverGenerations(t *testing.T) {
	s, _ := startService(t, "keep-port")
	first := s.await("addresses").text
	for generation := 2; generation <= 4; generation++ {
		if m := s.await("addresses"); m.text != first {
			t.Errorf("generation %d: %s, want %s", generation, m.text, first)
		}
	}
}

func init() {
	// keep-port asks for the port of the first generation by turns as port 0 and
	// by the number.
	roles["keep-port"] = func() {
		addrs := []string{"localhost:0", "localhost:0", "127.0.0.1:0"}
		generation := 0
		if arg() != "" {
			known := strings.Split(arg(), " ")
			fmt.Sscan(known[0], &generation)
			if generation%2 == 1 {
				addrs = known[1:]
			}
		}
		upg := must(tableflip.New(tableflip.Options{}))
		given := []string{
			must(upg.Listen("tcp", addrs[0])).Addr().String(),
			must(upg.ListenPacket("udp", addrs[1])).LocalAddr().String(),
			must(upg.Listen("tcp4", addrs[2])).Addr().String(),
		}
		mustBeReady(upg)
		report("addresses", given)
		must(0, upg.WaitForParent(context.Background()))
		if generation < 3 {
			os.Setenv(argVariable, fmt.Sprint(generation+1, " ", strings.Join(given, " ")))
			must(0, upg.Upgrade())
		}
	}
}

// Whoever closes a listener has not removed it.
func TestClosedListenersAreHandedOver(t *testing.T) {
	dir := socketDir(t)
	path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
	upg, s := newParent(t, tableflip.Options{}, "answer-all",
		withArg("tcp localhost:0\nunix "+path+"\nunixgram "+gram))
	ln := opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	local := opened[net.Listener](t)(upg.Listen("unix", path))
	packets := opened[net.PacketConn](t)(upg.ListenPacket("unixgram", gram))
	waiting := append(dialAll(t, 1, ln.Addr()), dialAll(t, 1, local.Addr())...)
	ln.Close()
	local.Close()
	packets.Close()
	upgrade(t, upg)
	if got := answers(t, waiting); got[0] != "0" || got[1] != "1" {
		t.Errorf("answers are %q", got)
	}
	client := opened[net.Conn](t)(net.Dial("unixgram", gram))
	if _, err := fmt.Fprint(client, "hello"); err != nil {
		t.Fatal(err)
	}
	s.await("datagram")
}

func TestFilesComeInTheOrderInWhichTheyWereAdded(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "files")
	order := []string{"z", "a", "m", "b", "", "y", "claimed", "last"}
	for _, fileName := range order {
		require(t, upg.AddFile(fileName, os.Stderr))
	}
	// Not a file, though its name is one's.
	opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	require(t, upg.AddFile("a", os.Stderr)) // again
	require(t, upg.RemoveFile("y"))
	upgrade(t, upg)
	if got, want := s.await("claimed").text, "fd:claimed:"; got != want {
		t.Errorf("File returned %q, want %q", got, want)
	}
	if got, want := s.await("files").text, `["fd:z:" "fd:m:" "fd:b:" "fd::" "fd:last:" "fd:a:"]`; got != want {
		t.Errorf("Files returned %s, want %s", got, want)
	}
	if got := s.await("rest").text; got != "0 <nil>" {
		t.Errorf("after that, Files returned %s", got)
	}
}

func init() {
	roles["files"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		report("claimed", must(upg.File("claimed")).Name())
		var names []string
		for _, file := range must(upg.Files()) {
			names = append(names, file.Name())
		}
		report("files", fmt.Sprintf("%q", names))
		rest, err := upg.Files()
		report("rest", len(rest), err)
		mustBeReady(upg)
	}
}

var oddNames = []string{
	"", " ", "a b", ":", "fd:a:", "a:b:c", "\n", "a\nb\r", "\x00", "a\x00b", "\xff\xfe", "é\xc3", ",", ";", "%2C", "+", "=", "\t",
	"/", "..", "TABLEFLIP_HANDOVER=1", strings.Repeat("long", 1000),
}

func TestNamesAreArbitraryBytes(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "odd-names")
	file := opened[*os.File](t)(os.Create(filepath.Join(t.TempDir(), "file")))
	server, client := connect(t)
	for i, odd := range oddNames {
		if _, err := fmt.Fprintf(file, "%d\n", i); err != nil {
			t.Fatal(err)
		}
		read := opened[*os.File](t)(os.Open(file.Name()))
		if _, err := read.Seek(int64(i), io.SeekStart); err != nil {
			t.Fatal(err)
		}
		require(t, upg.AddFile(odd, read))
		require(t, upg.AddConn(odd, oddNames[len(oddNames)-1-i], server))
	}
	upgrade(t, upg)
	requireOpen(t, "connections", client, server)
	if m := s.await("odd"); m.text != "<nil>" {
		t.Error(m.text)
	}
}

func init() {
	roles["odd-names"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		var errs []error
		for i, odd := range oddNames {
			conn, err := upg.Conn(odd, oddNames[len(oddNames)-1-i])
			if conn == nil {
				errs = append(errs, fmt.Errorf("connection %q: %w", odd, err))
			}
			file, err := upg.File(odd)
			if file == nil {
				errs = append(errs, fmt.Errorf("file %q: %w", odd, err))
				continue
			}
			if at := must(file.Seek(0, io.SeekCurrent)); at != int64(i) {
				errs = append(errs, fmt.Errorf("file %q is the one of number %d", odd, at))
			}
			if want := "fd:" + odd + ":"; file.Name() != want {
				errs = append(errs, fmt.Errorf("file %q has the name %q", odd, file.Name()))
			}
		}
		mustBeReady(upg)
		report("odd", errors.Join(errs...))
	}
}

// Linux takes no environment string longer than 128 KiB. How the table is spread is
// env_test.go's.
func TestLargeTableReachesTheChild(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "list-files")
	var want []string
	for i := range 12 {
		fileName := fmt.Sprint(10+i, strings.Repeat("x", 50_000))
		require(t, upg.AddFile(fileName, os.Stderr))
		want = append(want, "fd:"+fileName+":")
	}
	upgrade(t, upg)
	if got := s.await("files").text; got != fmt.Sprintf("%q", want) {
		t.Errorf("the child got %d bytes of names, want %d", len(got), len(fmt.Sprintf("%q", want)))
	}
}

func TestTableThatCannotFitFailsBeforeAnythingIsStarted(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "list-files")
	require(t, upg.AddFile(strings.Repeat("x", 8<<20), os.Stderr))
	require(t, upg.AddFile("small", os.Stderr))
	ready(t, upg)
	err := upg.Upgrade()
	wantError(t, "Upgrade", err, syscall.E2BIG)
	if err != nil && !strings.Contains(err.Error(), "shorter names") {
		t.Errorf("%.300q does not say what to do", err)
	}
	require(t, upg.RemoveFile(strings.Repeat("x", 8<<20)))
	require(t, upg.Upgrade())
	if got := s.await("files").text; got != `["fd:small:"]` {
		t.Errorf("the child got %.100s", got)
	}
}

func TestManyDescriptorsReachTheChild(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "list-files")
	var want []string
	for i := range 300 {
		fileName := strconv.Itoa(1000 + i)
		require(t, upg.AddFile(fileName, os.Stderr))
		want = append(want, "fd:"+fileName+":")
	}
	upgrade(t, upg)
	if got := s.await("files").text; got != fmt.Sprintf("%q", want) {
		t.Errorf("the child got %s", got)
	}
}

// What Listen and its kin are given

type brokenListener struct{ net.Listener }

type brokenPacketConn struct{ net.PacketConn }

func TestCallbackDecidesWhatIsAdded(t *testing.T) {
	upg := newUpgrader(t, tableflip.Options{})
	broken := errors.New("broken")
	for story, callback := range map[string]func(string, string) (net.Listener, error){
		"an error":       func(string, string) (net.Listener, error) { return nil, broken },
		"nil":            func(string, string) (net.Listener, error) { return nil, nil },
		"a nil listener": func(string, string) (net.Listener, error) { return (*net.TCPListener)(nil), nil },
		"no SyscallConn": func(string, string) (net.Listener, error) {
			return brokenListener{must(net.Listen("tcp", "localhost:0"))}, nil
		},
		"nothing, as there is none": nil,
	} {
		ln, err := upg.ListenWithCallback("tcp", "x", callback)
		if err == nil || ln != nil {
			t.Errorf("callback returned %s: got %v, %v", story, ln, err)
		} else if !strings.HasPrefix(err.Error(), "tableflip: ") || (story == "an error") != errors.Is(err, broken) {
			t.Errorf("callback returned %s: %v", story, err)
		}
	}
	for story, callback := range map[string]func(string, string) (net.PacketConn, error){
		"an error": func(string, string) (net.PacketConn, error) { return nil, broken },
		"nil":      func(string, string) (net.PacketConn, error) { return nil, nil },
		"no SyscallConn": func(string, string) (net.PacketConn, error) {
			return brokenPacketConn{must(net.ListenPacket("udp", "localhost:0"))}, nil
		},
		"nothing, as there is none": nil,
	} {
		conn, err := upg.ListenPacketWithCallback("udp", "x", callback)
		if err == nil || conn != nil {
			t.Errorf("callback returned %s: got %v, %v", story, conn, err)
		} else if !strings.HasPrefix(err.Error(), "tableflip: ") || (story == "an error") != errors.Is(err, broken) {
			t.Errorf("callback returned %s: %v", story, err)
		}
	}
	wantError(t, "RemoveListener", upg.RemoveListener("tcp", "x"), os.ErrNotExist)
	wantError(t, "RemovePacketConn", upg.RemovePacketConn("udp", "x"), os.ErrNotExist)
}

// What a callback has created, and the registry does not want, is closed.
func TestUnusableSocketOfACallbackIsClosed(t *testing.T) {
	upg := newUpgrader(t, tableflip.Options{})
	ln := must(net.Listen("tcp", "localhost:0"))
	if _, err := upg.ListenWithCallback("tcp", "x", func(string, string) (net.Listener, error) {
		return brokenListener{ln}, nil
	}); err == nil {
		t.Fatal("no error")
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener is open: %v", err)
	}
}

func TestCallbackGetsWhatWasAskedForAndMayUseTheRegistry(t *testing.T) {
	upg := newUpgrader(t, tableflip.Options{})
	done := inBackground(func() error {
		_, err := upg.ListenWithCallback("tcp", "a name", func(network, addr string) (net.Listener, error) {
			if network != "tcp" || addr != "a name" {
				t.Errorf("asked for %q %q", network, addr)
			}
			return upg.Listen("tcp", "localhost:0")
		})
		return err
	})
	require(t, within(t, "ListenWithCallback", done))
	require(t, upg.RemoveListener("tcp", "a name"))
	require(t, upg.RemoveListener("tcp", "localhost:0"))
}

func TestListenFailsWithTheCause(t *testing.T) {
	upg := newUpgrader(t, tableflip.Options{})
	taken := opened[net.Listener](t)(net.Listen("tcp", "localhost:0"))
	_, err := upg.Listen("tcp", taken.Addr().String())
	wantError(t, "Listen", err, syscall.EADDRINUSE)
	var op *net.OpError
	if !errors.As(err, &op) || !strings.HasPrefix(err.Error(), "tableflip: ") {
		t.Errorf("got %v", err)
	}
	_, err = upg.ListenPacket("unixgram", "/nonexistent/socket")
	wantError(t, "ListenPacket", err, os.ErrNotExist)
	if _, err = upg.Listen("no network", ""); err == nil {
		t.Error("Listen on no network")
	}
}

func TestNothingIsInheritedByTheFirstGeneration(t *testing.T) {
	upg := newUpgrader(t, tableflip.Options{})
	opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	require(t, upg.AddFile("a", os.Stderr))
	for range 2 {
		if ln, err := upg.Listener("tcp", "localhost:0"); ln != nil || err != nil {
			t.Errorf("Listener: %v, %v", ln, err)
		}
		if conn, err := upg.PacketConn("udp", "localhost:0"); conn != nil || err != nil {
			t.Errorf("PacketConn: %v, %v", conn, err)
		}
		if conn, err := upg.Conn("tcp", "localhost:0"); conn != nil || err != nil {
			t.Errorf("Conn: %v, %v", conn, err)
		}
		if file, err := upg.File("a"); file != nil || err != nil {
			t.Errorf("File: %v, %v", file, err)
		}
		if files, err := upg.Files(); files != nil || err != nil {
			t.Errorf("Files: %v, %v", files, err)
		}
		ready(t, upg)
	}
}

func TestNothingIsNoDescriptor(t *testing.T) {
	upg := newUpgrader(t, tableflip.Options{})
	closedConn, _ := connect(t)
	closedConn.Close()
	closedListener := must(net.Listen("tcp", "localhost:0")).(*net.TCPListener)
	closedListener.Close()
	for story, err := range map[string]error{
		"nil listener":        upg.AddListener("tcp", "", nil),
		"listener of nothing": upg.AddListener("tcp", "", (*net.TCPListener)(nil)),
		"empty listener":      upg.AddListener("tcp", "", &net.TCPListener{}),
		"nil packet conn":     upg.AddPacketConn("udp", "", nil),
		"empty packet conn":   upg.AddPacketConn("udp", "", &net.UDPConn{}),
		"nil connection":      upg.AddConn("tcp", "", nil),
		"nil file":            upg.AddFile("a", nil),
	} {
		if err == nil || !strings.HasPrefix(err.Error(), "tableflip: add ") {
			t.Errorf("%s: %v", story, err)
		}
	}
	wantError(t, "closed file", upg.AddFile("a", closedFile()), os.ErrClosed)
	wantError(t, "closed connection", upg.AddConn("tcp", "", closedConn), net.ErrClosed)
	wantError(t, "closed listener", upg.AddListener("tcp", "", closedListener), net.ErrClosed)
	for range 2 {
		wantError(t, "RemoveFile", upg.RemoveFile("a"), os.ErrNotExist)
	}
}

// Add and Remove

func TestAddClosesTheDuplicateThatItReplaces(t *testing.T) {
	upg := newUpgrader(t, tableflip.Options{})

	server, client := connect(t)
	require(t, upg.AddConn("tcp", "a", server))
	server.Close()
	other, _ := connect(t)
	require(t, upg.AddConn("tcp", "a", other))
	requireEOF(t, "the replaced connection", client)

	for _, name := range []string{"tcp", "localhost:0"} {
		first := must(net.Listen("tcp", "localhost:0")).(*net.TCPListener)
		require(t, upg.AddListener(name, "x", first))
		first.Close()
		opened[net.Conn](t)(net.Dial("tcp", first.Addr().String()))
		second := opened[net.Listener](t)(net.Listen("tcp", "localhost:0")).(*net.TCPListener)
		require(t, upg.AddListener(name, "x", second))
		requireRefused(t, "the replaced listener", "tcp", first.Addr().String())
	}

	read, write, err := os.Pipe()
	require(t, err)
	defer read.Close()
	require(t, upg.AddFile("a", write))
	write.Close()
	require(t, upg.AddFile("a", os.Stderr))
	read.SetReadDeadline(time.Now().Add(patience))
	if _, err := read.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the replaced file: %v", err)
	}

	// There is one of each now.
	require(t, upg.RemoveConn("tcp", "a"))
	wantError(t, "RemoveConn", upg.RemoveConn("tcp", "a"), os.ErrNotExist)
	require(t, upg.RemoveListener("tcp", "x"))
	wantError(t, "RemoveListener", upg.RemoveListener("tcp", "x"), os.ErrNotExist)
	require(t, upg.RemoveFile("a"))
	wantError(t, "RemoveFile", upg.RemoveFile("a"), os.ErrNotExist)
}

// One and the same listener may be added again.
func TestAddListenerTwiceIsAddingItOnce(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg := newUpgrader(t, tableflip.Options{})
	ln := opened[net.Listener](t)(upg.Listen("unix", path)).(*net.UnixListener)
	for range 2 {
		require(t, upg.AddListener("unix", path, ln))
	}
	dialAll(t, 1, ln.Addr())
	ln.Close()
	if !exists(path) {
		t.Error("Close has unlinked a socket that is still passed on")
	}
	upg.Stop()
	if exists(path) {
		t.Error("Stop has not unlinked the socket")
	}
}

// A listener that another one has replaced is its owner's again, file and all.
func TestReplacedUnixListenerUnlinksItsFile(t *testing.T) {
	dir := socketDir(t)
	path, next := filepath.Join(dir, "s"), filepath.Join(dir, "next")
	upg := newUpgrader(t, tableflip.Options{})
	first := must(net.Listen("unix", path)).(*net.UnixListener)
	second := must(net.Listen("unix", next)).(*net.UnixListener)
	require(t, upg.AddListener("unix", "name", first))
	require(t, upg.AddListener("unix", "name", second))
	first.Close()
	second.Close()
	if exists(path) {
		t.Error("the file of the replaced listener is left behind")
	}
	if !exists(next) {
		t.Error("the file of its successor is gone")
	}
}

// Its successor has bound the path in the meantime: the file is not the old one's.
func TestReplacedUnixListenerLeavesTheFileToItsSuccessor(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg := newUpgrader(t, tableflip.Options{})
	first := must(net.Listen("unix", path)).(*net.UnixListener)
	require(t, upg.AddListener("unix", path, first))
	require(t, os.Remove(path))
	second := opened[net.Listener](t)(net.Listen("unix", path)).(*net.UnixListener)
	require(t, upg.AddListener("unix", path, second))
	first.Close()
	opened[net.Conn](t)(net.Dial("unix", path))
}

func TestRemoveSaysIfThereIsNothing(t *testing.T) {
	upg := newUpgrader(t, tableflip.Options{})
	require(t, upg.AddFile("name", os.Stderr))
	for what, err := range map[string]error{
		"RemoveListener":        upg.RemoveListener("tcp", "name"),
		"RemovePacketConn":      upg.RemovePacketConn("udp", "name"),
		"RemoveConn":            upg.RemoveConn("fd", "name"),
		"RemoveFile":            upg.RemoveFile("other"),
		"RemoveFile by a Name ": upg.RemoveFile("fd:name:"),
	} {
		wantError(t, what, err, os.ErrNotExist)
		if err != nil && !strings.HasPrefix(err.Error(), "tableflip: remove ") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestRemovedDescriptorsAreNotPassedOn(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "inventory", withArg("listener tcp localhost:0\npacket udp localhost:0\nconn tcp a\nfile a"))
	ln := opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	packets := opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0"))
	server, client := connect(t)
	require(t, upg.AddConn("tcp", "a", server))
	require(t, upg.AddFile("a", os.Stderr))
	require(t, upg.RemoveListener("tcp", "localhost:0"))
	require(t, upg.RemovePacketConn("udp", packets.LocalAddr().String()))
	require(t, upg.RemoveConn("tcp", "a"))
	require(t, upg.RemoveFile("a"))

	// They are the caller's still.
	dialAll(t, 1, ln.Addr())
	opened[net.Conn](t)(ln.Accept())
	requireOpen(t, "removed connection", client, server)

	upgrade(t, upg)
	if m := s.await("inventory"); m.text != "[nothing nothing nothing nothing]" {
		t.Errorf("the child got %s", m.text)
	}
	ln.Close()
	requireRefused(t, "removed listener", "tcp", ln.Addr().String())
	server.Close()
	requireEOF(t, "removed connection", client)
}

func init() {
	// inventory tells which of the descriptors that it is asked for were there,
	// or with which error it could not have them.
	roles["inventory"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		var found []any
		add := func(present bool, err error) {
			switch {
			case err != nil:
				found = append(found, err)
			case present:
				found = append(found, "there")
			default:
				found = append(found, "nothing")
			}
		}
		for line := range strings.SplitSeq(arg(), "\n") {
			kind, rest, _ := strings.Cut(line, " ")
			network, addr, _ := strings.Cut(rest, " ")
			switch kind {
			case "listener":
				ln, err := upg.Listener(network, addr)
				add(ln != nil, err)
			case "packet":
				conn, err := upg.PacketConn(network, addr)
				add(conn != nil, err)
			case "conn":
				conn, err := upg.Conn(network, addr)
				add(conn != nil, err)
			case "file":
				file, err := upg.File(network)
				add(file != nil, err)
			}
		}
		mustBeReady(upg)
		report("inventory", found)
	}
}

func TestRemovedUnixListenerUnlinksItsFileAndCanBeListenedOnAgain(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg := newUpgrader(t, tableflip.Options{})
	for range 3 {
		ln, err := upg.Listen("unix", path)
		require(t, err)
		require(t, upg.RemoveListener("unix", path))
		if !exists(path) {
			t.Fatal("RemoveListener has unlinked the socket, which is open")
		}
		ln.Close()
		if exists(path) {
			t.Fatal("Close has left the socket that is no longer passed on")
		}
	}

	// The file of a packet conn is always its owner's to unlink.
	for range 3 {
		conn, err := upg.ListenPacket("unixgram", path)
		require(t, err)
		require(t, upg.RemovePacketConn("unixgram", path))
		conn.Close()
		require(t, os.Remove(path))
	}

	ln, err := upg.Listen("tcp", "localhost:0")
	require(t, err)
	addr := ln.Addr().String()
	require(t, upg.RemoveListener("tcp", addr))
	ln.Close()
	opened[net.Listener](t)(upg.Listen("tcp", addr))
	wantError(t, "RemoveListener", upg.RemoveListener("tcp", "localhost:0"), os.ErrNotExist)
	require(t, upg.RemoveListener("tcp", addr))
}

// The socket of a listener that has two names is removed with the second.
func TestUnixListenerWithTwoNamesKeepsItsFileForEither(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg := newUpgrader(t, tableflip.Options{})
	ln := opened[net.Listener](t)(upg.Listen("unix", path)).(*net.UnixListener)
	require(t, upg.AddListener("unix", "another", ln))
	require(t, upg.RemoveListener("unix", path))
	ln.Close()
	opened[net.Conn](t)(net.Dial("unix", path))
	upg.Stop()
	if exists(path) {
		t.Error("Stop has not unlinked the socket")
	}
}

func TestRemoveTakesTheOneAddedFirst(t *testing.T) {
	upg := newUpgrader(t, tableflip.Options{})
	var addrs []string
	for range 3 {
		ln := must(upg.Listen("tcp", "localhost:0"))
		addrs = append(addrs, ln.Addr().String())
		ln.Close()
	}
	for i, addr := range addrs {
		require(t, upg.RemoveListener("tcp", "localhost:0"))
		requireRefused(t, "the one removed", "tcp", addr)
		for _, later := range addrs[i+1:] {
			opened[net.Conn](t)(net.Dial("tcp", later))
		}
	}
}

// During and after an upgrade

// The child has got what there was when its upgrade began. Until it is known who is
// in charge, nothing changes.
func TestChangesWaitForTheEndOfAnUpgrade(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	server, _ := connect(t)
	pipe, other, err := os.Pipe()
	require(t, err)
	defer pipe.Close()
	defer other.Close()
	udp := opened[net.PacketConn](t)(net.ListenPacket("udp", "localhost:0")).(*net.UDPConn)
	tcp := opened[net.Listener](t)(net.Listen("tcp", "localhost:0")).(*net.TCPListener)
	changes := map[string]func(*tableflip.Upgrader) error{
		"Listen":           func(upg *tableflip.Upgrader) error { return listens(upg.Listen("unix", path)) },
		"ListenPacket":     func(upg *tableflip.Upgrader) error { return listens(upg.ListenPacket("unixgram", path+"gram")) },
		"AddListener":      func(upg *tableflip.Upgrader) error { return upg.AddListener("tcp", "", tcp) },
		"AddPacketConn":    func(upg *tableflip.Upgrader) error { return upg.AddPacketConn("udp", "", udp) },
		"AddConn":          func(upg *tableflip.Upgrader) error { return upg.AddConn("tcp", "", server) },
		"AddFile":          func(upg *tableflip.Upgrader) error { return upg.AddFile("b", pipe) },
		"RemoveFile":       func(upg *tableflip.Upgrader) error { return upg.RemoveFile("a") },
		"RemoveListener":   func(upg *tableflip.Upgrader) error { return upg.RemoveListener("tcp", "early") },
		"RemovePacketConn": func(upg *tableflip.Upgrader) error { return upg.RemovePacketConn("udp", "early") },
		"RemoveConn":       func(upg *tableflip.Upgrader) error { return upg.RemoveConn("tcp", "early") },
	}
	type result struct {
		change string
		err    error
	}
	begin := func(t *testing.T, role string) (*tableflip.Upgrader, *service, <-chan result) {
		upg, s := newParent(t, tableflip.Options{}, role)
		require(t, upg.AddFile("a", pipe))
		require(t, upg.AddListener("tcp", "early", tcp))
		require(t, upg.AddPacketConn("udp", "early", udp))
		require(t, upg.AddConn("tcp", "early", server))
		ready(t, upg)
		results := make(chan result, len(changes))
		during(t, step.ChildStarted, func() {
			for change, call := range changes {
				begun := make(chan struct{})
				go func() {
					close(begun)
					results <- result{change, call(upg)}
				}()
				<-begun
			}
		})
		return upg, s, results
	}

	t.Run("and succeed if it fails", func(t *testing.T) {
		upg, s, results := begin(t, "hang")
		ctx, cancel := context.WithCancel(t.Context())
		upgraded := inBackground(func() error { return upg.UpgradeContext(ctx) })
		s.await("hanging")
		for range len(results) {
			r := <-results
			t.Errorf("%s did not wait: %v", r.change, r.err)
		}
		cancel()
		wantError(t, "Upgrade", within(t, "Upgrade", upgraded), context.Canceled)
		if t.Failed() {
			return
		}
		for range changes {
			if r := within(t, "changes", results); r.err != nil {
				t.Errorf("%s: %v", r.change, r.err)
			}
		}
	})
	t.Run("and fail if it succeeds", func(t *testing.T) {
		upg, _, results := begin(t, "succeed")
		require(t, upg.Upgrade())
		for range changes {
			r := within(t, "changes", results)
			wantError(t, r.change, r.err, tableflip.ErrUpgraded)
		}
		if exists(path) || exists(path+"gram") {
			t.Error("Listen failed and left its socket")
		}
	})
}

// The address may be one that the new process wants.
func TestListenTakesNoAddressDuringAnUpgrade(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg, s := newParent(t, tableflip.Options{}, "listen-first", withArg(path))
	ready(t, upg)
	failed := make(chan error, 1)
	during(t, step.ChildStarted, func() {
		begun := make(chan struct{})
		go func() {
			close(begun)
			failed <- listens(upg.Listen("unix", path))
		}()
		<-begun
	})
	require(t, upg.Upgrade())
	wantError(t, "Listen", within(t, "Listen", failed), tableflip.ErrUpgraded)
	s.await("ready")
	opened[net.Conn](t)(net.Dial("unix", path))
}

func init() {
	roles["listen-first"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		must(upg.Listen("unix", arg()))
		mustBeReady(upg)
		report("ready")
		untilKilled()
	}
}

// A socket that is bound when an upgrade begins, and that comes too late for it,
// is gone.
func TestSocketThatCameTooLateForAnUpgradeIsGone(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg, _ := newParent(t, tableflip.Options{}, "succeed")
	ready(t, upg)
	var upgraded <-chan error
	beginUpgrade := func() {
		started := make(chan struct{})
		during(t, step.ChildStarted, func() { close(started) })
		upgraded = inBackground(upg.Upgrade)
		<-started
	}
	_, err := upg.ListenPacketWithCallback("unixgram", path, func(network, addr string) (net.PacketConn, error) {
		defer beginUpgrade()
		return net.ListenPacket(network, addr)
	})
	wantError(t, "ListenPacket", err, tableflip.ErrUpgraded)
	require(t, within(t, "Upgrade", upgraded))
	if exists(path) {
		t.Error("the socket is left behind")
	}
}

// After a successful upgrade, and after Stop, nothing is lost in silence.
func TestRegistryOfAnEndedProcessRefusesAll(t *testing.T) {
	for _, end := range []struct {
		story string
		run   func(*tableflip.Upgrader) error
		want  error
	}{
		{"upgrade", (*tableflip.Upgrader).Upgrade, tableflip.ErrUpgraded},
		{"Stop", func(upg *tableflip.Upgrader) error { upg.Stop(); return nil }, tableflip.ErrStopped},
	} {
		t.Run(end.story, func(t *testing.T) {
			path := filepath.Join(socketDir(t), "s")
			server, client := connect(t)
			upg, s := newParent(t, tableflip.Options{}, "succeed")
			ln := opened[net.Listener](t)(upg.Listen("tcp", "localhost:0")).(*net.TCPListener)
			udp := opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0")).(*net.UDPConn)
			require(t, upg.AddConn("tcp", "a", server))
			require(t, upg.AddFile("a", os.Stderr))
			ready(t, upg)
			require(t, end.run(upg))
			for what, err := range map[string]error{
				"Listen":           listens(upg.Listen("unix", path)),
				"ListenPacket":     listens(upg.ListenPacket("unixgram", path)),
				"Listener":         listens(upg.Listener("tcp", "localhost:0")),
				"PacketConn":       listens(upg.PacketConn("udp", "localhost:0")),
				"Conn":             listens(upg.Conn("tcp", "a")),
				"File":             listens(upg.File("a")),
				"Files":            listens(upg.Files()),
				"AddListener":      upg.AddListener("tcp", "b", ln),
				"AddPacketConn":    upg.AddPacketConn("udp", "b", udp),
				"AddConn":          upg.AddConn("tcp", "b", server),
				"AddFile":          upg.AddFile("b", os.Stderr),
				"RemoveListener":   upg.RemoveListener("tcp", "localhost:0"),
				"RemovePacketConn": upg.RemovePacketConn("udp", "localhost:0"),
				"RemoveConn":       upg.RemoveConn("tcp", "a"),
				"RemoveFile":       upg.RemoveFile("a"),
			} {
				wantError(t, what, err, end.want)
			}
			if exists(path) {
				t.Error("Listen failed and left its socket")
			}

			// Without the child nothing is open but what the caller has.
			s.awaitEnd()
			ln.Close()
			requireRefused(t, "listener", "tcp", ln.Addr().String())
			server.Close()
			requireEOF(t, "connection", client)
		})
	}
}

// Connections

// Elsewhere an inherited connection stays open until the process exits.
func TestClosingAnInheritedConnectionClosesIt(t *testing.T) {
	ln := opened[net.Listener](t)(net.Listen("tcp", "localhost:0"))
	s, _ := startService(t, "hold-connections", withArg("0 "+ln.Addr().String()))
	peers := map[string]net.Conn{}
	for _, name := range []string{"closed", "kept", "unclaimed"} {
		peers[name] = opened[net.Conn](t)(ln.Accept())
	}
	m := s.await("claimed")
	if m.text != "true true" {
		t.Errorf("claimed in the second generation: %s", m.text)
	}
	requireEOF(t, "connection that nobody claimed", peers["unclaimed"])
	requireEOF(t, "connection that was closed", peers["closed"])
	if err := syscall.Kill(m.pid, 0); err != nil {
		t.Errorf("the process that closed it has ended: %v", err)
	}
	terminate(t, m.pid)

	// A closed one is not passed on, one that is open is.
	if m := s.await("claimed"); m.text != "false true" {
		t.Errorf("claimed in the third generation: %s", m.text)
	}
	peers["kept"].SetDeadline(time.Now().Add(patience))
	got, err := io.ReadAll(peers["kept"])
	if string(got) != "012" {
		t.Errorf("the generations have written %q, %v", got, err)
	}
}

func init() {
	roles["hold-connections"] = func() {
		terminated := terminated()
		number, addr, _ := strings.Cut(arg(), " ")
		generation := must(strconv.Atoi(number))
		upg := must(tableflip.New(tableflip.Options{Command: func(cmd *exec.Cmd) {
			cmd.Env = append(cmd.Env, withArg(fmt.Sprint(generation+1, " ", addr)))
		}}))
		if generation == 0 {
			for _, connName := range []string{"closed", "kept", "unclaimed"} {
				conn := must(net.Dial("tcp", addr)).(*net.TCPConn)
				must(0, upg.AddConn("tcp", connName, conn))
				if connName == "kept" {
					must(io.WriteString(conn, "0"))
				}
				conn.Close()
			}
			mustBeReady(upg)
			must(0, upg.Upgrade())
			return
		}
		closed := must(upg.Conn("tcp", "closed"))
		kept := must(upg.Conn("tcp", "kept"))
		must(io.WriteString(kept, number))
		mustBeReady(upg)
		must(0, upg.WaitForParent(context.Background()))
		if closed != nil {
			closed.Close()
		}
		report("claimed", closed != nil, kept != nil)
		if generation == 1 {
			<-terminated
			must(0, upg.Upgrade())
		}
	}
}

func TestRemovedConnectionClosesWithItsOwner(t *testing.T) {
	upg := newUpgrader(t, tableflip.Options{})
	server, client := connect(t)
	require(t, upg.AddConn("tcp", "a", server))
	server.Close()
	client.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection that is to be passed on: %v", err)
	}
	require(t, upg.RemoveConn("tcp", "a"))
	requireEOF(t, "the removed connection", client)
}

// Unix sockets

// Elsewhere a child that fails takes the socket of its parent along: an outage.
func TestFailedChildLeavesTheUnixSocketsOfItsParent(t *testing.T) {
	for _, way := range []string{
		"listen", "claim nothing", "close", "remove", "remove and claim again", "add again", "add again and remove", "add by another name",
		"add another listener by its name", "listen elsewhere",
	} {
		t.Run(way, func(t *testing.T) {
			dir := socketDir(t)
			path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
			upg, s := newParent(t, tableflip.Options{}, "fail-with-sockets", withArg(way+"\n"+dir))
			local := opened[net.Listener](t)(upg.Listen("unix", path))
			opened[net.PacketConn](t)(upg.ListenPacket("unixgram", gram))
			ready(t, upg)
			var exit *exec.ExitError
			if err := upg.Upgrade(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
				t.Errorf("Upgrade: %v, want exit status 7", err)
			}
			s.await("stopped")
			left, _ := filepath.Glob(filepath.Join(dir, "*"))
			if want := []string{gram, path}; !slices.Equal(left, want) {
				t.Errorf("there is %v, want %v", left, want)
			}
			dialAll(t, 1, local.Addr())
			opened[net.Conn](t)(net.Dial("unixgram", gram))
		})
	}
}

func init() {
	roles["fail-with-sockets"] = func() {
		way, dir, _ := strings.Cut(arg(), "\n")
		path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
		upg := must(tableflip.New(tableflip.Options{}))
		if way != "claim nothing" {
			ln := must(upg.Listen("unix", path)).(*net.UnixListener)
			packets := must(upg.ListenPacket("unixgram", gram)).(*net.UnixConn)
			other := func() *net.UnixListener {
				return must(net.Listen("unix", filepath.Join(dir, "other"))).(*net.UnixListener)
			}
			switch way {
			case "close":
				ln.Close()
				packets.Close()
			case "remove":
				must(0, upg.RemoveListener("unix", path))
				must(0, upg.RemovePacketConn("unixgram", gram))
				ln.Close()
				packets.Close()
			case "remove and claim again":
				must(0, upg.RemoveListener("unix", path))
				if must(upg.Listener("unix", path)) == nil {
					panic("it cannot be claimed again")
				}
			case "add again":
				must(0, upg.AddListener("unix", path, ln))
				must(0, upg.AddPacketConn("unixgram", gram, packets))
			case "add again and remove":
				must(0, upg.AddListener("unix", path, ln))
				must(0, upg.RemoveListener("unix", path))
				ln.Close()
			case "add by another name":
				must(0, upg.AddListener("unix", "another", ln))
				must(0, upg.AddPacketConn("unixgram", "another", packets))
				must(0, upg.RemoveListener("unix", path))
				ln.Close()
			case "add another listener by its name":
				must(0, upg.AddListener("unix", path, other()))
				ln.Close()
			case "listen elsewhere":
				must(upg.Listen("unix", filepath.Join(dir, "own")))
				must(upg.ListenPacket("unixgram", filepath.Join(dir, "own gram")))
				must(0, upg.AddListener("unix", "mine", other()))
			}
		}
		upg.Stop()
		report("stopped")
		os.Exit(7)
	}
}

func TestProcessInChargeUnlinksTheSocketsOfAllGenerations(t *testing.T) {
	dir := socketDir(t)
	s, _ := startService(t, "collect-sockets", withArg(dir))
	for generation := 1; generation <= 3; generation++ {
		if m := s.await("sockets"); m.text != strconv.Itoa(2*generation) {
			t.Errorf("there are %s sockets in generation %d", m.text, generation)
		}
	}
	s.awaitEnd()
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func init() {
	roles["collect-sockets"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		generation := len(os.Getenv("TABLEFLIP_TEST_GENERATION"))
		os.Setenv("TABLEFLIP_TEST_GENERATION", strings.Repeat("x", generation+1))
		for i := range generation + 1 {
			path := filepath.Join(arg(), strconv.Itoa(i))
			// As many services do, which must not be mistaken for another's file.
			must(upg.Listen("unix", path))
			must(0, os.Chmod(path, 0o600))
			must(upg.ListenPacket("unixgram", path+"gram"))
		}
		mustBeReady(upg)
		must(0, upg.WaitForParent(context.Background()))
		all, _ := filepath.Glob(filepath.Join(arg(), "*"))
		report("sockets", len(all))
		if generation < 2 {
			must(0, upg.Upgrade())
			return
		}
		upg.Stop()
	}
}

func TestUnclaimedDescriptorsAreClosedAfterTheCommit(t *testing.T) {
	dir := socketDir(t)
	path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
	upg, s := newParent(t, tableflip.Options{}, "claim-nothing")
	tcp := must(upg.Listen("tcp", "localhost:0"))
	local := must(upg.Listen("unix", path))
	packets := must(upg.ListenPacket("unixgram", gram))
	server, client := connect(t)
	require(t, upg.AddConn("tcp", "a", server))
	require(t, upg.AddFile("a", os.Stderr))
	during(t, step.BeforeCommit, func() {
		dialAll(t, 1, tcp.Addr())
		dialAll(t, 1, local.Addr())
		opened[net.Conn](t)(net.Dial("unixgram", gram))
		requireOpen(t, "connection", client, server)
	})
	upgrade(t, upg)
	for _, socket := range []io.Closer{tcp, local, packets, server} {
		socket.Close()
	}
	logged := s.await("ready").text
	for _, want := range []string{
		`"listener:tcp:localhost:0"`, `"listener:unix:` + path + `"`, `"packet:unixgram:` + gram + `"`, `"conn:tcp:a"`, `"fd:a:"`,
	} {
		if strings.Count(logged, want[1:len(want)-1]) != 1 {
			t.Errorf("%s is not logged once: %s", want, logged)
		}
	}
	if strings.Count(logged, "\n") != 5 {
		t.Errorf("logged %s", logged)
	}
	if exists(path) || exists(gram) {
		t.Error("the sockets that nobody claimed are not unlinked")
	}
	requireRefused(t, "listener", "tcp", tcp.Addr().String())
	requireEOF(t, "connection", client)
}

func init() {
	roles["claim-nothing"] = func() {
		var log bytes.Buffer
		upg := must(tableflip.New(tableflip.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}))
		mustBeReady(upg)
		report("ready", log.String())
		untilKilled()
	}
}

// A child that moves in where its parent was, without taking its sockets, keeps
// its own.
func TestUnclaimedUnixSocketsThatTheChildBoundAnewStay(t *testing.T) {
	dir := socketDir(t)
	path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
	upg, s := newParent(t, tableflip.Options{}, "bind-anew", withArg(dir))
	opened[net.Listener](t)(upg.Listen("unix", path))
	opened[net.PacketConn](t)(upg.ListenPacket("unixgram", gram))
	upgrade(t, upg)
	child := s.await("ready")
	if got := answerOf(t, "unix", path); got != "anew" {
		t.Errorf("the answer is %q", got)
	}
	opened[net.Conn](t)(net.Dial("unixgram", gram))
	terminate(t, child.pid)
	s.awaitEnd()
	if exists(path) || exists(gram) {
		t.Error("Stop has not unlinked the child's own sockets")
	}
}

func init() {
	roles["bind-anew"] = func() {
		terminated := terminated()
		path, gram := filepath.Join(arg(), "s"), filepath.Join(arg(), "gram")
		upg := must(tableflip.New(tableflip.Options{}))
		must(0, errors.Join(os.Remove(path), os.Remove(gram)))
		ln := must(net.Listen("unix", path)).(*net.UnixListener)
		packets := must(net.ListenPacket("unixgram", gram)).(*net.UnixConn)
		must(0, upg.AddListener("unix", "my "+path, ln))
		must(0, upg.AddPacketConn("unixgram", "my "+gram, packets))
		mustBeReady(upg)
		report("ready")
		go func() {
			conn := must(ln.Accept())
			must(io.WriteString(conn, "anew"))
			conn.Close()
		}()
		<-terminated
		upg.Stop()
	}
}

// What was removed before Ready counts as what nobody claimed.
func TestListenerRemovedBeforeReadyIsUnlinkedAfterTheCommit(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg, s := newParent(t, tableflip.Options{}, "remove-before-ready", withArg(path))
	local := opened[net.Listener](t)(upg.Listen("unix", path))
	during(t, step.BeforeCommit, func() { dialAll(t, 1, local.Addr()) })
	upgrade(t, upg)
	if m := s.await("exists"); m.text != "true false" {
		t.Errorf("the socket exists before and after Ready: %s", m.text)
	}
}

func init() {
	roles["remove-before-ready"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		ln := must(upg.Listen("unix", arg()))
		must(0, upg.RemoveListener("unix", arg()))
		ln.Close()
		before := exists(arg())
		mustBeReady(upg)
		report("exists", before, exists(arg()))
	}
}

// And so does what the child replaced.
func TestListenerReplacedBeforeReadyIsUnlinkedAfterTheCommit(t *testing.T) {
	dir := socketDir(t)
	path, next := filepath.Join(dir, "s"), filepath.Join(dir, "next")
	upg, s := newParent(t, tableflip.Options{}, "replace-before-ready", withArg(path+"\n"+next))
	local := opened[net.Listener](t)(upg.Listen("unix", path))
	during(t, step.BeforeCommit, func() { dialAll(t, 1, local.Addr()) })
	upgrade(t, upg)
	if m := s.await("exists"); m.text != "true true false true" {
		t.Errorf("the old and the new socket exist before and after Ready: %s", m.text)
	}
}

func init() {
	roles["replace-before-ready"] = func() {
		path, next, _ := strings.Cut(arg(), "\n")
		upg := must(tableflip.New(tableflip.Options{}))
		old := must(upg.Listener("unix", path))
		must(0, upg.AddListener("unix", path, must(net.Listen("unix", next)).(*net.UnixListener)))
		old.Close()
		before := []any{exists(path), exists(next)}
		mustBeReady(upg)
		report("exists", append(before, exists(path), exists(next))...)
	}
}

// In a process in charge that is as in the first generation.
func TestInheritedListenerRemovedAfterReadyUnlinksItsFile(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg, s := newParent(t, tableflip.Options{}, "remove-after-ready", withArg(path))
	opened[net.Listener](t)(upg.Listen("unix", path))
	upgrade(t, upg)
	if m := s.await("exists"); m.text != "true true false" {
		t.Errorf("the socket exists after Ready, RemoveListener and Close: %s", m.text)
	}
}

func init() {
	roles["remove-after-ready"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		ln := must(upg.Listen("unix", arg()))
		mustBeReady(upg)
		atReady := exists(arg())
		must(0, upg.RemoveListener("unix", arg()))
		removed := exists(arg())
		ln.Close()
		report("exists", atReady, removed, exists(arg()))
	}
}

// Another process has put its socket where one of ours was.
func TestSocketFileOfAnotherProcessIsLeftAlone(t *testing.T) {
	dir := socketDir(t)
	path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
	upg, s := newParent(t, tableflip.Options{}, "stop-on-signal")
	opened[net.Listener](t)(upg.Listen("unix", path))
	opened[net.PacketConn](t)(upg.ListenPacket("unixgram", gram))

	// Bound beside it and renamed, as those do who take care.
	opened[net.Listener](t)(net.Listen("unix", path+".new"))
	opened[net.PacketConn](t)(net.ListenPacket("unixgram", gram+".new"))
	require(t, os.Rename(path+".new", path))
	require(t, os.Rename(gram+".new", gram))

	requireTheirs := func(when string) {
		t.Helper()
		if !exists(path) || !exists(gram) {
			t.Fatalf("%s: the socket of another process was unlinked", when)
		}
	}
	upgrade(t, upg)
	child := s.await("ready")
	requireTheirs("after an upgrade to a child that claimed nothing")
	terminate(t, child.pid)
	s.awaitEnd()
	requireTheirs("after the child's Stop")
	upg.Stop()

	upg = newUpgrader(t, tableflip.Options{})
	require(t, os.Remove(path))
	opened[net.Listener](t)(upg.Listen("unix", path))
	opened[net.Listener](t)(net.Listen("unix", path+".new"))
	require(t, os.Rename(path+".new", path))
	upg.Stop()
	requireTheirs("after Stop of the first generation")
}

func init() {
	roles["stop-on-signal"] = func() {
		terminated := terminated()
		upg := must(tableflip.New(tableflip.Options{}))
		mustBeReady(upg)
		report("ready")
		<-terminated
		upg.Stop()
	}
}

// A socket that was bound under another name and renamed into place is ours.
func TestRenamedSocketIsUnlinkedByStop(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	upg := newUpgrader(t, tableflip.Options{})
	opened[net.Listener](t)(upg.ListenWithCallback("unix", path, func(network, addr string) (net.Listener, error) {
		ln, err := net.Listen(network, addr+".new")
		if err != nil {
			return nil, err
		}
		return ln, os.Rename(addr+".new", addr)
	}))
	if !exists(path) {
		t.Fatal("there is no socket")
	}
	upg.Stop()
	if exists(path) {
		t.Error("Stop left the socket")
	}
}

// A path is relative to the directory in which the socket was bound.
func TestRelativeUnixSocketsSurviveChdir(t *testing.T) {
	dir := socketDir(t)
	t.Chdir(dir)
	upg, s := newParent(t, tableflip.Options{}, "wandering-sockets")
	opened[net.Listener](t)(upg.Listen("unix", "a"))
	opened[net.Listener](t)(upg.Listen("unix", "unclaimed"))
	opened[net.PacketConn](t)(upg.ListenPacket("unixgram", "./gram"))
	t.Chdir(os.TempDir())
	upgrade(t, upg)
	child := s.await("ready")
	if child.text != "<nil>" {
		t.Error(child.text)
	}
	if !exists(filepath.Join(dir, "a")) || !exists(filepath.Join(dir, "gram")) || exists(filepath.Join(dir, "unclaimed")) {
		t.Error("Ready should unlink what was not claimed, and only that")
	}
	terminate(t, child.pid)
	s.awaitEnd()
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func init() {
	roles["wandering-sockets"] = func() {
		terminated := terminated()
		must(0, os.Chdir("/"))
		upg := must(tableflip.New(tableflip.Options{}))
		var missing []error
		if ln, err := upg.Listener("unix", "a"); ln == nil {
			missing = append(missing, fmt.Errorf("a: %w", err))
		}
		if conn, err := upg.PacketConn("unixgram", "./gram"); conn == nil {
			missing = append(missing, fmt.Errorf("./gram: %w", err))
		}
		mustBeReady(upg)
		report("ready", errors.Join(missing...))
		<-terminated
		upg.Stop()
	}
}

// What the table says and what the descriptor is

// A disguised file calls itself something else.
type disguisedFile struct {
	net.Listener
	net.Conn
	file *os.File
}

func (d disguisedFile) SyscallConn() (syscall.RawConn, error) { return d.file.SyscallConn() }
func (d disguisedFile) Close() error                          { return nil }
func (d disguisedFile) Addr() net.Addr                        { return nil }
func (d disguisedFile) LocalAddr() net.Addr                   { return nil }

type disguisedPacketConn struct {
	net.PacketConn
	file *os.File
}

func (d disguisedPacketConn) SyscallConn() (syscall.RawConn, error) { return d.file.SyscallConn() }
func (d disguisedPacketConn) LocalAddr() net.Addr                   { return nil }

func TestDescriptorOfTheWrongTypeIsAClearError(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "wrong-types")
	file := opened[*os.File](t)(os.Open(os.Args[0]))
	require(t, upg.AddListener("tcp", "a", disguisedFile{file: file}))
	require(t, upg.AddConn("tcp", "a", disguisedFile{file: file}))
	require(t, upg.AddPacketConn("udp", "a", disguisedPacketConn{file: file}))
	upgrade(t, upg)
	for _, kind := range []string{"listener:tcp:a", "listener:tcp:a", "packet:udp:a", "packet:udp:a", "conn:tcp:a"} {
		m := s.await("claim")
		if !strings.HasPrefix(m.text, "true tableflip: ") || !strings.Contains(m.text, kind) {
			t.Errorf("%s: %s", kind, m.text)
		}
	}
	logged := s.await("log").text
	for _, kind := range []string{"listener:tcp:a", "packet:udp:a", "conn:tcp:a"} {
		if !strings.Contains(logged, kind) {
			t.Errorf("%s is lost: %s", kind, logged)
		}
	}
}

func init() {
	roles["wrong-types"] = func() {
		var log bytes.Buffer
		upg := must(tableflip.New(tableflip.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}))
		for range 2 {
			// Listen must not bind anew what its parent has.
			ln, err := upg.Listen("tcp", "a")
			report("claim", ln == nil, err)
		}
		for range 2 {
			conn, err := upg.ListenPacket("udp", "a")
			report("claim", conn == nil, err)
		}
		conn, err := upg.Conn("tcp", "a")
		report("claim", conn == nil, err)
		mustBeReady(upg)
		report("log", log.String())
	}
}

// The blocking mode belongs to the open file, which parent and child share: who
// changes it changes it for both.
func TestBlockingModesAreLeftAlone(t *testing.T) {
	upg, _ := newParent(t, tableflip.Options{}, "fail")
	ln := opened[net.Listener](t)(upg.Listen("tcp", "localhost:0")).(*net.TCPListener)
	server, _ := connect(t)
	require(t, upg.AddConn("tcp", "a", server))
	pollable, other, err := os.Pipe()
	require(t, err)
	defer pollable.Close()
	defer other.Close()
	var pair [2]int
	require(t, unix.Pipe(pair[:]))
	blocking, otherBlocking := os.NewFile(uintptr(pair[0]), ""), os.NewFile(uintptr(pair[1]), "")
	defer blocking.Close()
	defer otherBlocking.Close()
	require(t, upg.AddFile("pollable", pollable))
	require(t, upg.AddFile("blocking", blocking))
	stdin := os.Stdin
	defer func() { os.Stdin = stdin }()
	os.Stdin = pollable

	flags := func() (all []int) {
		for _, source := range []syscall.Conn{ln, server, pollable, blocking, other, otherBlocking} {
			raw, err := source.SyscallConn()
			require(t, err)
			require(t, raw.Control(func(fd uintptr) {
				for _, command := range []int{unix.F_GETFL, unix.F_GETFD} {
					flag, err := unix.FcntlInt(fd, command, 0)
					require(t, err)
					all = append(all, flag)
				}
			}))
		}
		return all
	}
	before := flags()
	ready(t, upg)
	if err := upg.Upgrade(); err == nil {
		t.Fatal("no error")
	}
	if after := flags(); !slices.Equal(after, before) {
		t.Errorf("after a failed upgrade the flags are %o, and were %o", after, before)
	}
}

func TestBlockingModesAreLeftAloneByTheChild(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "claim-files")
	pollable, other, err := os.Pipe()
	require(t, err)
	defer pollable.Close()
	defer other.Close()
	var pair [2]int
	require(t, unix.Pipe(pair[:]))
	blocking, otherBlocking := os.NewFile(uintptr(pair[0]), ""), os.NewFile(uintptr(pair[1]), "")
	defer blocking.Close()
	defer otherBlocking.Close()
	require(t, upg.AddFile("pollable", pollable))
	require(t, upg.AddFile("blocking", blocking))
	isNonblocking := func(file *os.File) (nonblocking bool) {
		raw, err := file.SyscallConn()
		require(t, err)
		require(t, raw.Control(func(fd uintptr) {
			flag, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
			require(t, err)
			nonblocking = flag&unix.O_NONBLOCK != 0
		}))
		return nonblocking
	}
	upgrade(t, upg)
	s.await("claimed")
	if !isNonblocking(pollable) || isNonblocking(blocking) {
		t.Errorf("non-blocking: %v %v, want true false", isNonblocking(pollable), isNonblocking(blocking))
	}
}

func init() {
	roles["claim-files"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		must(upg.File("pollable"))
		must(upg.File("blocking"))
		mustBeReady(upg)
		report("claimed")
		untilKilled()
	}
}

// A claim makes a descriptor for the caller and keeps one, no more.
func TestChildHoldsNoDescriptorAfterStop(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "count-descriptors")
	for i := range 10 {
		opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
		opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0"))
		require(t, upg.AddFile(strconv.Itoa(i), os.Stderr))
		server, _ := connect(t)
		require(t, upg.AddConn("tcp", strconv.Itoa(i), server))
	}
	upgrade(t, upg)
	// And the ready pipe. The verdict pipe tells of the parent's end.
	if m := s.await("closed"); m.text != "41" {
		t.Errorf("of 42 descriptors, %s are closed", m.text)
	}
}

func init() {
	roles["count-descriptors"] = func() {
		debug.SetGCPercent(-1)
		// Have the runtime open what it needs first.
		read, write, err := os.Pipe()
		must(0, errors.Join(err, read.Close(), write.Close()))
		before := openDescriptors()
		upg := must(tableflip.New(tableflip.Options{}))
		for i := range 9 {
			must(upg.Listener("tcp", "localhost:0")).Close()
			must(upg.PacketConn("udp", "localhost:0")).Close()
			must(upg.File(strconv.Itoa(i))).Close()
			must(upg.Conn("tcp", strconv.Itoa(i))).Close()
		}
		mustBeReady(upg)
		upg.Stop()
		report("closed", before-openDescriptors())
	}
}

// Each inherited descriptor is somebody's, and nobody else's.
func TestManyGoroutinesClaimEachDescriptorOnce(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "claim-at-once")
	var want []string
	for i := range 20 {
		ln := opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
		require(t, upg.AddFile(strconv.Itoa(i), os.Stderr))
		want = append(want, ln.Addr().String(), fmt.Sprintf("fd:%d:", i))
	}
	slices.Sort(want)
	upgrade(t, upg)
	if got := s.await("claimed").text; got != fmt.Sprint(want) {
		t.Errorf("claimed %s, want %v", got, want)
	}
}

func init() {
	roles["claim-at-once"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		var all sync.WaitGroup
		claimed := make(chan string, 1000)
		for i := range 4 {
			all.Go(func() {
				for ln := must(upg.Listener("tcp", "localhost:0")); ln != nil; ln = must(upg.Listener("tcp", "localhost:0")) {
					claimed <- ln.Addr().String()
				}
			})
			all.Go(func() {
				for j := range 5 {
					if file := must(upg.File(strconv.Itoa(i + j))); file != nil {
						claimed <- file.Name()
					}
				}
				for _, file := range must(upg.Files()) {
					claimed <- file.Name()
				}
			})
		}
		all.Wait()
		close(claimed)
		names := slices.Sorted(func(yield func(string) bool) {
			for claim := range claimed {
				yield(claim)
			}
		})
		for range 3 {
			all.Go(func() { mustBeReady(upg) })
		}
		all.Wait()
		report("claimed", names)
	}
}

// A connected socket without an address of its own may be registered under the
// path of its peer, whose file must stay.
func TestStopLeavesFileOfPeer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	peer, err := net.ListenPacket("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	upg, _ := newParent(t, tableflip.Options{}, "fail")
	if err := upg.AddPacketConn("unixgram", path, conn); err != nil {
		t.Fatal(err)
	}
	ready(t, upg)
	upg.Stop()
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

// A listener unlinks by name when it is closed, so that it must not get that duty
// back once its file is another's.
func TestRemovedListenerLeavesFileOfAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	upg, _ := newParent(t, tableflip.Options{}, "fail")
	old, err := upg.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := upg.RemoveListener("unix", path); err != nil {
		t.Fatal(err)
	}
	old.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

func TestListenReplacesFileOfKilledProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	upg, _ := newParent(t, tableflip.Options{}, "fail")
	if _, err := upg.Listen("unix", path); !errors.Is(err, syscall.EADDRINUSE) {
		t.Fatalf("while it is open: %v, want that the address is in use", err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	ln, err := upg.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestListenPacketReplacesFileOfKilledProcess(t *testing.T) {
	path := filepath.Join(socketDir(t), "socket")
	dead := opened[*net.UnixConn](t)(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}))
	upg := newUpgrader(t, tableflip.Options{})
	if _, err := upg.ListenPacket("unixgram", path); !errors.Is(err, syscall.EADDRINUSE) {
		t.Fatalf("while it is open: %v, want that the address is in use", err)
	}
	require(t, dead.Close()) // which leaves the file
	conn := opened[net.PacketConn](t)(upg.ListenPacket("unixgram", path))
	sender := opened[net.Conn](t)(net.Dial("unixgram", path))
	must(sender.Write([]byte("x")))
	conn.SetDeadline(time.Now().Add(patience))
	if n, _, err := conn.ReadFrom(make([]byte, 1)); n != 1 {
		t.Error(err)
	}
}
