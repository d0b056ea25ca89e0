//go:build unix

package tableflip_test

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	"example.com/tableflip/internal/handovertest"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

func TestInheritNothing(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{})
	proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	proctest.OK(t, upg.AddFile("a", os.Stderr))
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
		proctest.OK(t, upg.Ready())
	}
}

func init() { proctest.Role("answer-all", handovertest.AnswerAll) }

// In cloudflare/tableflip v1.2.3 the second listener overwrites the first, which is lost
// with those who wait in its queue.
func TestListenPortZero(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "answer-all",
		proctest.WithArg("tcp localhost:0\ntcp localhost:0\ntcp localhost:0"))
	var listeners []net.Listener
	var waiting [][]net.Conn
	for range 3 {
		ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
		listeners = append(listeners, ln)
		waiting = append(waiting, proctest.Dial(t, 3, ln.Addr()))
	}
	handovertest.Upgrade(t, upg)
	for _, ln := range listeners {
		ln.Close()
	}
	s.Await("ready")
	for i, ln := range listeners {
		waiting[i] = append(waiting[i], proctest.Dial(t, 1, ln.Addr())...)
		for _, got := range proctest.Answers(t, waiting[i]) {
			if got != strconv.Itoa(i) {
				t.Errorf("listener %d was taken as the one of index %s", i, got)
			}
		}
	}
}

// On the main branch of cloudflare/tableflip, after v1.2.3, each generation binds another
// port.
func TestListenKeepsPort(t *testing.T) {
	s, _ := proctest.Start(t, "keep-port")
	first := s.Await("addresses").Text
	for generation := 2; generation <= 4; generation++ {
		if m := s.Await("addresses"); m.Text != first {
			t.Errorf("generation %d: %s, want %s", generation, m.Text, first)
		}
	}
}

func init() {
	// keep-port asks for the port of the first generation by turns as port 0 and
	// by the number.
	proctest.Role("keep-port", func() {
		addrs := []string{"localhost:0", "localhost:0", "127.0.0.1:0"}
		generation := 0
		if proctest.Arg() != "" {
			known := strings.Split(proctest.Arg(), " ")
			fmt.Sscan(known[0], &generation)
			if generation%2 == 1 {
				addrs = known[1:]
			}
		}
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		given := []string{
			proctest.Must(upg.Listen("tcp", addrs[0])).Addr().String(),
			proctest.Must(upg.ListenPacket("udp", addrs[1])).LocalAddr().String(),
			proctest.Must(upg.Listen("tcp4", addrs[2])).Addr().String(),
		}
		handovertest.MustBeReady(upg)
		proctest.Report("addresses", given)
		proctest.Must(0, upg.WaitForParent(context.Background()))
		if generation < 3 {
			proctest.SetArg(fmt.Sprint(generation+1, " ", strings.Join(given, " ")))
			proctest.Must(0, upg.Upgrade())
		}
	})
}

// Whoever closes a listener has not removed it.
func TestListenClosed(t *testing.T) {
	dir := proctest.SocketDir(t)
	path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "answer-all",
		proctest.WithArg("tcp localhost:0\nunix "+path+"\nunixgram "+gram))
	ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	local := proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	packets := proctest.Opened[net.PacketConn](t)(upg.ListenPacket("unixgram", gram))
	waiting := append(proctest.Dial(t, 1, ln.Addr()), proctest.Dial(t, 1, local.Addr())...)
	ln.Close()
	local.Close()
	packets.Close()
	handovertest.Upgrade(t, upg)
	if got := proctest.Answers(t, waiting); got[0] != "0" || got[1] != "1" {
		t.Errorf("answers are %q", got)
	}
	client := proctest.Opened[net.Conn](t)(net.Dial("unixgram", gram))
	proctest.Must(fmt.Fprint(client, "hello"))
	s.Await("datagram")
}

func TestListenErrors(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{})
	taken := proctest.Opened[net.Listener](t)(net.Listen("tcp", "localhost:0"))
	_, err := upg.Listen("tcp", taken.Addr().String())
	proctest.WantError(t, "Listen", err, syscall.EADDRINUSE)
	var op *net.OpError
	if !errors.As(err, &op) || !strings.HasPrefix(err.Error(), "tableflip: ") {
		t.Errorf("got %v", err)
	}
	_, err = upg.ListenPacket("unixgram", "/nonexistent/socket")
	proctest.WantError(t, "ListenPacket", err, os.ErrNotExist)
	if _, err = upg.Listen("no network", ""); err == nil {
		t.Error("Listen on no network")
	}
}

// What Listen and its kin are given

type brokenListener struct{ net.Listener }

type brokenPacketConn struct{ net.PacketConn }

func TestCallbackResults(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{})
	broken := errors.New("broken")
	for _, test := range []struct {
		story    string
		callback func(string, string) (net.Listener, error)
	}{
		{"an error", func(string, string) (net.Listener, error) { return nil, broken }},
		{"nil", func(string, string) (net.Listener, error) { return nil, nil }},
		{"a nil listener", func(string, string) (net.Listener, error) { return (*net.TCPListener)(nil), nil }},
		{"no SyscallConn", func(string, string) (net.Listener, error) {
			return brokenListener{proctest.Must(net.Listen("tcp", "localhost:0"))}, nil
		}},
		{"nothing, because it is nil", nil},
	} {
		ln, err := upg.ListenWithCallback("tcp", "x", test.callback)
		if err == nil || ln != nil {
			t.Errorf("callback returned %s: got %v, %v", test.story, ln, err)
		} else if !strings.HasPrefix(err.Error(), "tableflip: ") || (test.story == "an error") != errors.Is(err, broken) {
			t.Errorf("callback returned %s: %v", test.story, err)
		}
	}
	for _, test := range []struct {
		story    string
		callback func(string, string) (net.PacketConn, error)
	}{
		{"an error", func(string, string) (net.PacketConn, error) { return nil, broken }},
		{"nil", func(string, string) (net.PacketConn, error) { return nil, nil }},
		{"no SyscallConn", func(string, string) (net.PacketConn, error) {
			return brokenPacketConn{proctest.Must(net.ListenPacket("udp", "localhost:0"))}, nil
		}},
		{"nothing, because it is nil", nil},
	} {
		conn, err := upg.ListenPacketWithCallback("udp", "x", test.callback)
		if err == nil || conn != nil {
			t.Errorf("callback returned %s: got %v, %v", test.story, conn, err)
		} else if !strings.HasPrefix(err.Error(), "tableflip: ") || (test.story == "an error") != errors.Is(err, broken) {
			t.Errorf("callback returned %s: %v", test.story, err)
		}
	}
	proctest.WantError(t, "RemoveListener", upg.RemoveListener("tcp", "x"), os.ErrNotExist)
	proctest.WantError(t, "RemovePacketConn", upg.RemovePacketConn("udp", "x"), os.ErrNotExist)
}

// What a callback has created, and the registry does not want, is closed.
func TestCallbackUnusable(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{})
	ln := proctest.Must(net.Listen("tcp", "localhost:0"))
	if _, err := upg.ListenWithCallback("tcp", "x", func(string, string) (net.Listener, error) {
		return brokenListener{ln}, nil
	}); err == nil {
		t.Fatal("no error")
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener is open: %v", err)
	}
}

func TestCallbackArguments(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{})
	done := proctest.InBackground(func() error {
		_, err := upg.ListenWithCallback("tcp", "a name", func(network, addr string) (net.Listener, error) {
			if network != "tcp" || addr != "a name" {
				t.Errorf("asked for %q %q", network, addr)
			}
			return upg.Listen("tcp", "localhost:0")
		})
		return err
	})
	proctest.OK(t, proctest.Within(t, "ListenWithCallback", done))
	proctest.OK(t, upg.RemoveListener("tcp", "a name"))
	proctest.OK(t, upg.RemoveListener("tcp", "localhost:0"))
}

func TestListenPacketPortZero(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "answer-all",
		proctest.WithArg("udp localhost:0\nudp localhost:0"))
	for i := range 2 {
		conn := proctest.Opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0"))
		client := proctest.Opened[net.Conn](t)(net.Dial("udp", conn.LocalAddr().String()))
		proctest.Must(fmt.Fprint(client, "to ", i))
	}
	handovertest.Upgrade(t, upg)
	got := []string{s.Await("datagram").Text, s.Await("datagram").Text}
	slices.Sort(got)
	if want := []string{"0 to 0", "1 to 1"}; !slices.Equal(got, want) {
		t.Errorf("received %q, want %q", got, want)
	}
}

func TestListenPacketUnix(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "answer-all", proctest.WithArg("unixgram "+path))
	proctest.Opened[net.PacketConn](t)(upg.ListenPacket("unixgram", path))
	client := proctest.Opened[net.Conn](t)(net.Dial("unixgram", path))
	proctest.Must(fmt.Fprint(client, "early"))
	handovertest.Upgrade(t, upg)
	if m := s.Await("datagram"); m.Text != "0 early" {
		t.Errorf("received %q", m.Text)
	}
	proctest.Must(fmt.Fprint(client, "late"))
	if m := s.Await("datagram"); m.Text != "0 late" {
		t.Errorf("received %q", m.Text)
	}
}

// Connections and files

// In cloudflare/tableflip v1.2.3 an inherited connection stays open until the process exits.
func TestConnClosed(t *testing.T) {
	ln := proctest.Opened[net.Listener](t)(net.Listen("tcp", "localhost:0"))
	s, _ := proctest.Start(t, "hold-connections", proctest.WithArg("0 "+ln.Addr().String()))
	peers := map[string]net.Conn{}
	for _, name := range []string{"closed", "kept", "unclaimed"} {
		peers[name] = proctest.Opened[net.Conn](t)(ln.Accept())
	}
	m := s.Await("claimed")
	if m.Text != "true true" {
		t.Errorf("claimed in the second generation: %s", m.Text)
	}
	proctest.WantEOF(t, "connection that nobody claimed", peers["unclaimed"])
	proctest.WantEOF(t, "connection that was closed", peers["closed"])
	if err := syscall.Kill(m.PID, 0); err != nil {
		t.Errorf("the process that closed it has ended: %v", err)
	}
	proctest.Terminate(t, m.PID)

	// A closed one is not passed on, one that is open is.
	if m := s.Await("claimed"); m.Text != "false true" {
		t.Errorf("claimed in the third generation: %s", m.Text)
	}
	peers["kept"].SetDeadline(time.Now().Add(proctest.Patience))
	got, err := io.ReadAll(peers["kept"])
	if string(got) != "012" {
		t.Errorf("the generations have written %q, %v", got, err)
	}
}

func init() {
	proctest.Role("hold-connections", func() {
		terminated := proctest.Terminated()
		number, addr, _ := strings.Cut(proctest.Arg(), " ")
		generation := proctest.Must(strconv.Atoi(number))
		upg := proctest.Must(tableflip.New(tableflip.Options{Command: func(cmd *exec.Cmd) {
			cmd.Env = append(cmd.Env, proctest.WithArg(fmt.Sprint(generation+1, " ", addr)))
		}}))
		if generation == 0 {
			for _, connName := range []string{"closed", "kept", "unclaimed"} {
				conn := proctest.Must(net.Dial("tcp", addr)).(*net.TCPConn)
				proctest.Must(0, upg.AddConn("tcp", connName, conn))
				if connName == "kept" {
					proctest.Must(io.WriteString(conn, "0"))
				}
				conn.Close()
			}
			handovertest.MustBeReady(upg)
			proctest.Must(0, upg.Upgrade())
			return
		}
		closed := proctest.Must(upg.Conn("tcp", "closed"))
		kept := proctest.Must(upg.Conn("tcp", "kept"))
		proctest.Must(io.WriteString(kept, number))
		handovertest.MustBeReady(upg)
		proctest.Must(0, upg.WaitForParent(context.Background()))
		if closed != nil {
			closed.Close()
		}
		proctest.Report("claimed", closed != nil, kept != nil)
		if generation == 1 {
			<-terminated
			proctest.Must(0, upg.Upgrade())
		}
	})
}

func TestConnRemoved(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{})
	server, client := proctest.Connect(t)
	proctest.OK(t, upg.AddConn("tcp", "a", server))
	server.Close()
	client.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection that is to be passed on: %v", err)
	}
	proctest.OK(t, upg.RemoveConn("tcp", "a"))
	proctest.WantEOF(t, "the removed connection", client)
}

func TestFilesOrder(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "files")
	order := []string{"z", "a", "m", "b", "", "y", "claimed", "last"}
	for _, fileName := range order {
		proctest.OK(t, upg.AddFile(fileName, os.Stderr))
	}
	// Not a file, though its name is one's.
	proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	proctest.OK(t, upg.AddFile("a", os.Stderr)) // again
	proctest.OK(t, upg.RemoveFile("y"))
	handovertest.Upgrade(t, upg)
	if got, want := s.Await("claimed").Text, "fd:claimed:"; got != want {
		t.Errorf("File returned %q, want %q", got, want)
	}
	if got, want := s.Await("files").Text, `["fd:z:" "fd:m:" "fd:b:" "fd::" "fd:last:" "fd:a:"]`; got != want {
		t.Errorf("Files returned %s, want %s", got, want)
	}
	if got := s.Await("rest").Text; got != "0 <nil>" {
		t.Errorf("after that, Files returned %s", got)
	}
}

func init() {
	proctest.Role("files", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Report("claimed", proctest.Must(upg.File("claimed")).Name())
		var names []string
		for _, file := range proctest.Must(upg.Files()) {
			names = append(names, file.Name())
		}
		proctest.Report("files", fmt.Sprintf("%q", names))
		rest, err := upg.Files()
		proctest.Report("rest", len(rest), err)
		handovertest.MustBeReady(upg)
	})
}

func TestAddNothing(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{})
	closedConn, _ := proctest.Connect(t)
	closedConn.Close()
	closedListener := proctest.Must(net.Listen("tcp", "localhost:0")).(*net.TCPListener)
	closedListener.Close()
	for _, test := range []struct {
		story string
		err   error
	}{
		{"nil listener", upg.AddListener("tcp", "", nil)},
		{"listener of nothing", upg.AddListener("tcp", "", (*net.TCPListener)(nil))},
		{"empty listener", upg.AddListener("tcp", "", &net.TCPListener{})},
		{"nil packet conn", upg.AddPacketConn("udp", "", nil)},
		{"empty packet conn", upg.AddPacketConn("udp", "", &net.UDPConn{})},
		{"nil connection", upg.AddConn("tcp", "", nil)},
		{"nil file", upg.AddFile("a", nil)},
	} {
		if test.err == nil || !strings.HasPrefix(test.err.Error(), "tableflip: add ") {
			t.Errorf("%s: %v", test.story, test.err)
		}
	}
	proctest.WantError(t, "closed file", upg.AddFile("a", proctest.ClosedFile()), os.ErrClosed)
	proctest.WantError(t, "closed connection", upg.AddConn("tcp", "", closedConn), net.ErrClosed)
	proctest.WantError(t, "closed listener", upg.AddListener("tcp", "", closedListener), net.ErrClosed)
	for range 2 {
		proctest.WantError(t, "RemoveFile", upg.RemoveFile("a"), os.ErrNotExist)
	}
}

// Add and Remove

func TestAddReplaces(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{})

	server, client := proctest.Connect(t)
	proctest.OK(t, upg.AddConn("tcp", "a", server))
	server.Close()
	other, _ := proctest.Connect(t)
	proctest.OK(t, upg.AddConn("tcp", "a", other))
	proctest.WantEOF(t, "the replaced connection", client)

	for _, name := range []string{"tcp", "localhost:0"} {
		first := proctest.Must(net.Listen("tcp", "localhost:0")).(*net.TCPListener)
		proctest.OK(t, upg.AddListener(name, "x", first))
		first.Close()
		proctest.Opened[net.Conn](t)(net.Dial("tcp", first.Addr().String()))
		second := proctest.Opened[net.Listener](t)(net.Listen("tcp", "localhost:0")).(*net.TCPListener)
		proctest.OK(t, upg.AddListener(name, "x", second))
		proctest.WantRefused(t, "the replaced listener", "tcp", first.Addr().String())
	}

	read, write, err := os.Pipe()
	proctest.OK(t, err)
	defer read.Close()
	proctest.OK(t, upg.AddFile("a", write))
	write.Close()
	proctest.OK(t, upg.AddFile("a", os.Stderr))
	read.SetReadDeadline(time.Now().Add(proctest.Patience))
	if _, err := read.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the replaced file: %v", err)
	}

	// There is one of each now.
	proctest.OK(t, upg.RemoveConn("tcp", "a"))
	proctest.WantError(t, "RemoveConn", upg.RemoveConn("tcp", "a"), os.ErrNotExist)
	proctest.OK(t, upg.RemoveListener("tcp", "x"))
	proctest.WantError(t, "RemoveListener", upg.RemoveListener("tcp", "x"), os.ErrNotExist)
	proctest.OK(t, upg.RemoveFile("a"))
	proctest.WantError(t, "RemoveFile", upg.RemoveFile("a"), os.ErrNotExist)
}

// One and the same listener may be added again.
func TestAddListenerTwice(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg := handovertest.NewUpgrader(t, tableflip.Options{})
	ln := proctest.Opened[net.Listener](t)(upg.Listen("unix", path)).(*net.UnixListener)
	for range 2 {
		proctest.OK(t, upg.AddListener("unix", path, ln))
	}
	proctest.Dial(t, 1, ln.Addr())
	ln.Close()
	if !proctest.Exists(path) {
		t.Error("Close has unlinked a socket that is still passed on")
	}
	upg.Stop()
	if proctest.Exists(path) {
		t.Error("Stop has not unlinked the socket")
	}
}

func TestRemove(t *testing.T) {
	upg, s := handovertest.NewParent(t, tableflip.Options{}, "inventory", proctest.WithArg("listener tcp localhost:0\npacket udp localhost:0\nconn tcp a\nfile a"))
	ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
	packets := proctest.Opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0"))
	server, client := proctest.Connect(t)
	proctest.OK(t, upg.AddConn("tcp", "a", server))
	proctest.OK(t, upg.AddFile("a", os.Stderr))
	proctest.OK(t, upg.RemoveListener("tcp", "localhost:0"))
	proctest.OK(t, upg.RemovePacketConn("udp", packets.LocalAddr().String()))
	proctest.OK(t, upg.RemoveConn("tcp", "a"))
	proctest.OK(t, upg.RemoveFile("a"))

	// They are the caller's still.
	proctest.Dial(t, 1, ln.Addr())
	proctest.Opened[net.Conn](t)(ln.Accept())
	proctest.WantOpen(t, "removed connection", client, server)

	handovertest.Upgrade(t, upg)
	if m := s.Await("inventory"); m.Text != "[nothing nothing nothing nothing]" {
		t.Errorf("the child got %s", m.Text)
	}
	ln.Close()
	proctest.WantRefused(t, "removed listener", "tcp", ln.Addr().String())
	server.Close()
	proctest.WantEOF(t, "removed connection", client)
}

func init() {
	// inventory tells which of the descriptors that it is asked for were there,
	// or with which error it could not have them.
	proctest.Role("inventory", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
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
		for line := range strings.SplitSeq(proctest.Arg(), "\n") {
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
		handovertest.MustBeReady(upg)
		proctest.Report("inventory", found)
	})
}

func TestRemoveNothing(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{})
	proctest.OK(t, upg.AddFile("name", os.Stderr))
	for _, test := range []struct {
		what string
		err  error
	}{
		{"RemoveListener", upg.RemoveListener("tcp", "name")},
		{"RemovePacketConn", upg.RemovePacketConn("udp", "name")},
		{"RemoveConn", upg.RemoveConn("fd", "name")},
		{"RemoveFile", upg.RemoveFile("other")},
		{"RemoveFile by a Name ", upg.RemoveFile("fd:name:")},
	} {
		proctest.WantError(t, test.what, test.err, os.ErrNotExist)
		if test.err != nil && !strings.HasPrefix(test.err.Error(), "tableflip: remove ") {
			t.Errorf("%s: %v", test.what, test.err)
		}
	}
}

func TestRemoveOrder(t *testing.T) {
	upg := handovertest.NewUpgrader(t, tableflip.Options{})
	var addrs []string
	for range 3 {
		ln := proctest.Must(upg.Listen("tcp", "localhost:0"))
		addrs = append(addrs, ln.Addr().String())
		ln.Close()
	}
	for i, addr := range addrs {
		proctest.OK(t, upg.RemoveListener("tcp", "localhost:0"))
		proctest.WantRefused(t, "the one removed", "tcp", addr)
		for _, later := range addrs[i+1:] {
			proctest.Opened[net.Conn](t)(net.Dial("tcp", later))
		}
	}
}

// During and after an upgrade

// The child has got what there was when its upgrade began. Until it is known who is
// in charge, nothing changes.
func TestChangeDuringUpgrade(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	server, _ := proctest.Connect(t)
	pipe, other, err := os.Pipe()
	proctest.OK(t, err)
	defer pipe.Close()
	defer other.Close()
	udp := proctest.Opened[net.PacketConn](t)(net.ListenPacket("udp", "localhost:0")).(*net.UDPConn)
	tcp := proctest.Opened[net.Listener](t)(net.Listen("tcp", "localhost:0")).(*net.TCPListener)
	changes := []struct {
		name string
		call func(*tableflip.Upgrader) error
	}{
		{"Listen", func(upg *tableflip.Upgrader) error { return proctest.ErrorOf(upg.Listen("unix", path)) }},
		{"ListenPacket", func(upg *tableflip.Upgrader) error {
			return proctest.ErrorOf(upg.ListenPacket("unixgram", path+"gram"))
		}},
		{"AddListener", func(upg *tableflip.Upgrader) error { return upg.AddListener("tcp", "", tcp) }},
		{"AddPacketConn", func(upg *tableflip.Upgrader) error { return upg.AddPacketConn("udp", "", udp) }},
		{"AddConn", func(upg *tableflip.Upgrader) error { return upg.AddConn("tcp", "", server) }},
		{"AddFile", func(upg *tableflip.Upgrader) error { return upg.AddFile("b", pipe) }},
		{"RemoveFile", func(upg *tableflip.Upgrader) error { return upg.RemoveFile("a") }},
		{"RemoveListener", func(upg *tableflip.Upgrader) error { return upg.RemoveListener("tcp", "early") }},
		{"RemovePacketConn", func(upg *tableflip.Upgrader) error { return upg.RemovePacketConn("udp", "early") }},
		{"RemoveConn", func(upg *tableflip.Upgrader) error { return upg.RemoveConn("tcp", "early") }},
	}
	type result struct {
		change string
		err    error
	}
	begin := func(t *testing.T, role string) (*tableflip.Upgrader, *proctest.Service, <-chan result) {
		upg, s := handovertest.NewParent(t, tableflip.Options{}, role)
		proctest.OK(t, upg.AddFile("a", pipe))
		proctest.OK(t, upg.AddListener("tcp", "early", tcp))
		proctest.OK(t, upg.AddPacketConn("udp", "early", udp))
		proctest.OK(t, upg.AddConn("tcp", "early", server))
		proctest.OK(t, upg.Ready())
		results := make(chan result, len(changes))
		proctest.During(t, step.ChildStarted, func() {
			for _, change := range changes {
				begun := make(chan struct{})
				go func() {
					close(begun)
					results <- result{change.name, change.call(upg)}
				}()
				<-begun
			}
		})
		return upg, s, results
	}

	t.Run("and succeed if it fails", func(t *testing.T) {
		upg, s, results := begin(t, "hang")
		ctx, cancel := context.WithCancel(t.Context())
		upgraded := proctest.InBackground(func() error { return upg.UpgradeContext(ctx) })
		s.Await("hanging")
		for range len(results) {
			r := <-results
			t.Errorf("%s did not wait: %v", r.change, r.err)
		}
		cancel()
		proctest.WantError(t, "Upgrade", proctest.Within(t, "Upgrade", upgraded), context.Canceled)
		if t.Failed() {
			return
		}
		for range changes {
			if r := proctest.Within(t, "changes", results); r.err != nil {
				t.Errorf("%s: %v", r.change, r.err)
			}
		}
	})
	t.Run("and fail if it succeeds", func(t *testing.T) {
		upg, _, results := begin(t, "succeed")
		proctest.OK(t, upg.Upgrade())
		for range changes {
			r := proctest.Within(t, "changes", results)
			proctest.WantError(t, r.change, r.err, tableflip.ErrUpgraded)
		}
		if proctest.Exists(path) || proctest.Exists(path+"gram") {
			t.Error("Listen failed and left its socket")
		}
	})
}

// After a successful upgrade, and after Stop, nothing is lost in silence.
func TestChangeAfterEnd(t *testing.T) {
	for _, end := range []struct {
		story string
		run   func(*tableflip.Upgrader) error
		want  error
	}{
		{"upgrade", (*tableflip.Upgrader).Upgrade, tableflip.ErrUpgraded},
		{"Stop", func(upg *tableflip.Upgrader) error { upg.Stop(); return nil }, tableflip.ErrStopped},
	} {
		t.Run(end.story, func(t *testing.T) {
			path := filepath.Join(proctest.SocketDir(t), "s")
			server, client := proctest.Connect(t)
			upg, s := handovertest.NewParent(t, tableflip.Options{}, "succeed")
			ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0")).(*net.TCPListener)
			udp := proctest.Opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0")).(*net.UDPConn)
			proctest.OK(t, upg.AddConn("tcp", "a", server))
			proctest.OK(t, upg.AddFile("a", os.Stderr))
			proctest.OK(t, upg.Ready())
			proctest.OK(t, end.run(upg))
			for _, test := range []struct {
				what string
				err  error
			}{
				{"Listen", proctest.ErrorOf(upg.Listen("unix", path))},
				{"ListenPacket", proctest.ErrorOf(upg.ListenPacket("unixgram", path))},
				{"Listener", proctest.ErrorOf(upg.Listener("tcp", "localhost:0"))},
				{"PacketConn", proctest.ErrorOf(upg.PacketConn("udp", "localhost:0"))},
				{"Conn", proctest.ErrorOf(upg.Conn("tcp", "a"))},
				{"File", proctest.ErrorOf(upg.File("a"))},
				{"Files", proctest.ErrorOf(upg.Files())},
				{"AddListener", upg.AddListener("tcp", "b", ln)},
				{"AddPacketConn", upg.AddPacketConn("udp", "b", udp)},
				{"AddConn", upg.AddConn("tcp", "b", server)},
				{"AddFile", upg.AddFile("b", os.Stderr)},
				{"RemoveListener", upg.RemoveListener("tcp", "localhost:0")},
				{"RemovePacketConn", upg.RemovePacketConn("udp", "localhost:0")},
				{"RemoveConn", upg.RemoveConn("tcp", "a")},
				{"RemoveFile", upg.RemoveFile("a")},
			} {
				proctest.WantError(t, test.what, test.err, end.want)
			}
			if proctest.Exists(path) {
				t.Error("Listen failed and left its socket")
			}

			// Without the child nothing is open but what the caller has.
			s.AwaitEnd()
			ln.Close()
			proctest.WantRefused(t, "listener", "tcp", ln.Addr().String())
			server.Close()
			proctest.WantEOF(t, "connection", client)
		})
	}
}
