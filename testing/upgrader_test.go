package testing_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/tableflip"
	stub "example.com/tableflip/testing"
)

func TestMethodsAreTableflips(t *testing.T) {
	for _, pair := range []struct{ real, stub reflect.Type }{
		{reflect.TypeFor[*tableflip.Upgrader](), reflect.TypeFor[*stub.Upgrader]()},
		{reflect.TypeFor[*tableflip.Fds](), reflect.TypeFor[*stub.Fds]()},
	} {
		want, got := signatures(pair.real), signatures(pair.stub)
		if len(want) == 0 {
			t.Errorf("%v has no methods", pair.real)
		}
		for name, signature := range want {
			if got[name] != signature {
				t.Errorf("%v.%s: got %v, want %v", pair.stub, name, got[name], signature)
			}
		}
		for name := range got {
			if want[name] == nil {
				t.Errorf("%v.%s: %v has no such method", pair.stub, name, pair.real)
			}
		}
	}
}

// signatures returns the types of all exported methods of receiver, without it.
func signatures(receiver reflect.Type) map[string]reflect.Type {
	methods := map[string]reflect.Type{}
	for m := range receiver.Methods() {
		in, out := slices.Collect(m.Type.Ins()), slices.Collect(m.Type.Outs())
		methods[m.Name] = reflect.FuncOf(in[1:], out, m.Type.IsVariadic())
	}
	return methods
}

func newUpgrader(t *testing.T) *stub.Upgrader {
	t.Helper()
	upg, err := stub.New()
	if err != nil {
		t.Fatal(err)
	}
	return upg
}

func TestNewMany(t *testing.T) {
	first, second := newUpgrader(t), newUpgrader(t)
	first.Stop()
	if !stopped(first) {
		t.Error("Stop did not close Exit")
	}
	if stopped(second) || second.Ready() != nil {
		t.Error("Stop stopped another Upgrader")
	}
}

func stopped(upg *stub.Upgrader) bool {
	select {
	case <-upg.Exit():
		return true
	default:
		return false
	}
}

func TestFirstGeneration(t *testing.T) {
	upg := newUpgrader(t)
	for range 2 {
		if err := upg.Ready(); err != nil {
			t.Errorf("Ready: %v", err)
		}
	}
	if upg.HasParent() {
		t.Error("HasParent is true")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := upg.WaitForParent(ctx); err != nil {
		t.Errorf("WaitForParent: %v", err)
	}
	if err := upg.Upgrade(); !errors.Is(err, tableflip.ErrNotSupported) {
		t.Errorf("Upgrade: got %v, want ErrNotSupported", err)
	}
	if err := upg.UpgradeContext(ctx); !errors.Is(err, tableflip.ErrNotSupported) {
		t.Errorf("UpgradeContext: got %v, want ErrNotSupported", err)
	}
	if err := upg.Rehearse(ctx); !errors.Is(err, tableflip.ErrNotSupported) {
		t.Errorf("Rehearse: got %v, want ErrNotSupported", err)
	}
	if stopped(upg) {
		t.Error("Exit was closed without Stop")
	}
}

func TestFail(t *testing.T) {
	before := time.Now()
	upg := newUpgrader(t)
	want := func(state string) {
		t.Helper()
		all := upg.Generations()
		if len(all) != 1 || all[0].PID != os.Getpid() || all[0].Number != 1 || all[0].State != state {
			t.Fatalf("the generations are %v, want this process, %s", all, state)
		}
		if since := all[0].Since; since.Before(before) || since.After(time.Now()) {
			t.Errorf("%s since %v", state, since)
		}
		before = time.Now()
	}
	want("in charge")
	for range 2 {
		upg.Fail(errors.New("no disk"))
		want("draining")
		before = upg.Generations()[0].Since // which does not change
	}
	if !stopped(upg) {
		t.Error("Fail did not close Exit")
	}
}

func TestStop(t *testing.T) {
	upg := newUpgrader(t)
	var callers sync.WaitGroup
	for range 10 {
		callers.Go(func() {
			upg.Stop()
			if !stopped(upg) {
				t.Error("Stop returned before Exit was closed")
			}
		})
	}
	callers.Wait()

	if err := upg.Ready(); !errors.Is(err, tableflip.ErrStopped) {
		t.Errorf("Ready: got %v, want ErrStopped", err)
	}
	if _, err := upg.Listen("tcp", "localhost:0"); !errors.Is(err, tableflip.ErrStopped) {
		t.Errorf("Listen: got %v, want ErrStopped", err)
	}
	if _, err := upg.ListenPacket("udp", "localhost:0"); !errors.Is(err, tableflip.ErrStopped) {
		t.Errorf("ListenPacket: got %v, want ErrStopped", err)
	}
	_, err := upg.ListenWithCallback("tcp", "localhost:0", func(string, string) (net.Listener, error) {
		t.Error("the callback was called")
		return nil, nil
	})
	if !errors.Is(err, tableflip.ErrStopped) {
		t.Errorf("ListenWithCallback: got %v, want ErrStopped", err)
	}
	_, err = upg.ListenPacketWithCallback("udp", "localhost:0", func(string, string) (net.PacketConn, error) {
		t.Error("the callback was called")
		return nil, nil
	})
	if !errors.Is(err, tableflip.ErrStopped) {
		t.Errorf("ListenPacketWithCallback: got %v, want ErrStopped", err)
	}
}

func TestListenListens(t *testing.T) {
	upg := newUpgrader(t)
	ln, err := upg.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	upg.Stop() // The listener is the caller's.

	var server sync.WaitGroup
	server.Go(func() {
		conn, err := ln.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		conn.Close()
	})
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		ln.Close()
		t.Error(err)
	} else {
		conn.Close()
	}
	server.Wait()
}

func TestListenPacketReceives(t *testing.T) {
	upg := newUpgrader(t)
	conn, err := upg.ListenPacket("udp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	upg.Stop()

	if _, err := conn.WriteTo([]byte("ping"), conn.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 16)
	n, _, err := conn.ReadFrom(buffer)
	if err != nil || string(buffer[:n]) != "ping" {
		t.Errorf("got %q, %v", buffer[:n], err)
	}
}

// memoryListener cannot be passed on: it has no descriptor.
type memoryListener struct{ net.Listener }

func TestListenWithCallback(t *testing.T) {
	upg := newUpgrader(t)
	want := &memoryListener{}
	var asked []string
	got, err := upg.ListenWithCallback("memory", "here", func(network, addr string) (net.Listener, error) {
		asked = []string{network, addr}
		return want, nil
	})
	if err != nil || got != want {
		t.Errorf("got %v, %v, want the callback's listener", got, err)
	}
	if !slices.Equal(asked, []string{"memory", "here"}) {
		t.Errorf("the callback was asked for %q", asked)
	}

	cause := errors.New("no memory")
	got, err = upg.ListenWithCallback("memory", "here", func(string, string) (net.Listener, error) {
		return nil, cause
	})
	if got != nil || !errors.Is(err, cause) || !strings.HasPrefix(err.Error(), "tableflip: ") {
		t.Errorf("got %v, %v, want the callback's error in tableflip's", got, err)
	}
}

type memoryPacketConn struct{ net.PacketConn }

func TestListenPacketWithCallback(t *testing.T) {
	upg := newUpgrader(t)
	want := &memoryPacketConn{}
	var asked []string
	got, err := upg.ListenPacketWithCallback("memory", "here", func(network, addr string) (net.PacketConn, error) {
		asked = []string{network, addr}
		return want, nil
	})
	if err != nil || got != want {
		t.Errorf("got %v, %v, want the callback's packet conn", got, err)
	}
	if !slices.Equal(asked, []string{"memory", "here"}) {
		t.Errorf("the callback was asked for %q", asked)
	}

	cause := errors.New("no memory")
	got, err = upg.ListenPacketWithCallback("memory", "here", func(string, string) (net.PacketConn, error) {
		return nil, cause
	})
	if got != nil || !errors.Is(err, cause) || !strings.HasPrefix(err.Error(), "tableflip: ") {
		t.Errorf("got %v, %v, want the callback's error in tableflip's", got, err)
	}
}

// Not even what was added is handed out: that would be another generation's.
func TestRegistryIsEmpty(t *testing.T) {
	upg := newUpgrader(t)
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	packet, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer packet.Close()
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()

	for _, change := range []struct {
		method string
		err    error
	}{
		{"AddListener", upg.AddListener("tcp", "a", ln)},
		{"AddPacketConn", upg.AddPacketConn("udp", "a", packet)},
		{"AddConn", upg.AddConn("udp", "a", packet)},
		{"AddFile", upg.AddFile("a", file)},
	} {
		if change.err != nil {
			t.Errorf("%s: %v", change.method, change.err)
		}
	}
	if ln, err := upg.Listener("tcp", "a"); ln != nil || err != nil {
		t.Errorf("Listener: got %v, %v, want nil, nil", ln, err)
	}
	if conn, err := upg.PacketConn("udp", "a"); conn != nil || err != nil {
		t.Errorf("PacketConn: got %v, %v, want nil, nil", conn, err)
	}
	if conn, err := upg.Conn("udp", "a"); conn != nil || err != nil {
		t.Errorf("Conn: got %v, %v, want nil, nil", conn, err)
	}
	if file, err := upg.File("a"); file != nil || err != nil {
		t.Errorf("File: got %v, %v, want nil, nil", file, err)
	}
	if files, err := upg.Files(); files != nil || err != nil {
		t.Errorf("Files: got %v, %v, want nil, nil", files, err)
	}
	for _, change := range []struct {
		method string
		err    error
	}{
		{"RemoveListener", upg.RemoveListener("tcp", "a")},
		{"RemovePacketConn", upg.RemovePacketConn("udp", "a")},
		{"RemoveConn", upg.RemoveConn("udp", "a")},
		{"RemoveFile", upg.RemoveFile("a")},
	} {
		if change.err != nil {
			t.Errorf("%s: %v", change.method, change.err)
		}
	}
	// The descriptors are still the caller's, and open.
	if _, err := ln.SyscallConn(); err != nil {
		t.Error(err)
	}
	if _, err := file.WriteString("x"); err != nil {
		t.Error(err)
	}
}

func TestZeroFds(t *testing.T) {
	var fds stub.Fds
	ln, err := fds.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
}
