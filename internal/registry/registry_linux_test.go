package registry_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/registry"
)

// The file of an open socket is not unlinked, and the check puts nothing in its queue.
func TestLiveSocketFile(t *testing.T) {
	types := map[string]int{"unix": unix.SOCK_STREAM, "unixpacket": unix.SOCK_SEQPACKET, "unixgram": unix.SOCK_DGRAM}
	for theirs, socketType := range types {
		for _, listening := range []bool{true, false} {
			if listening && theirs == "unixgram" {
				continue
			}
			t.Run(fmt.Sprint(theirs, " listening ", listening), func(t *testing.T) {
				path := filepath.Join(proctest.SocketDir(t), "s")
				fd := proctest.Must(unix.Socket(unix.AF_UNIX, socketType, 0))
				t.Cleanup(func() { unix.Close(fd) })
				proctest.OK(t, unix.SetNonblock(fd, true))
				proctest.OK(t, unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
				if listening {
					proctest.OK(t, unix.Listen(fd, 10))
				}
				before := proctest.Must(os.Lstat(path))

				r := firstGeneration(t, registry.Options{})
				wantInUse(t, "Listen", proctest.ErrorOf(r.Listen("unix", path)))
				wantInUse(t, "Listen", proctest.ErrorOf(r.Listen("unixpacket", path)))
				wantInUse(t, "ListenPacket", proctest.ErrorOf(r.ListenPacket("unixgram", path)))

				now, err := os.Lstat(path)
				if err != nil || !os.SameFile(before, now) || !now.ModTime().Equal(before.ModTime()) {
					t.Errorf("the file of a socket that is open was touched: %v", err)
				}
				if listening {
					conn, _, err := unix.Accept(fd)
					proctest.WantError(t, "accept", err, unix.EAGAIN)
					if err == nil {
						unix.Close(conn)
					}
				}
			})
		}
	}
}

// Who has found a dead socket's file waits for the others that have, and looks again.
func TestDeadSocketFileLock(t *testing.T) {
	dir := proctest.Must(filepath.EvalSymlinks(proctest.SocketDir(t)))
	path := filepath.Join(dir, "s")
	dead(t, "unix", path)
	unlock := descriptor.LockDir(dir)
	r := firstGeneration(t, registry.Options{})
	result := make(chan error, 1)
	go func() { result <- proctest.ErrorOf(r.Listen("unix", path)) }()
	proctest.AwaitThat(t, "Listen waits for the lock", func() bool { return openDescriptors(t)[dir] == 2 || len(result) > 0 })
	_ = os.Remove(path)
	proctest.Opened[net.Listener](t)(net.Listen("unix", path))
	unlock()
	wantInUse(t, "Listen", proctest.Within(t, "Listen", result))
}

func TestDeadSocketFileReplaced(t *testing.T) {
	for _, network := range []string{"unix", "unixpacket", "unixgram"} {
		path := filepath.Join(proctest.SocketDir(t), "s")
		for _, left := range []string{"unix", "unixpacket", "unixgram"} {
			dead(t, left, path)
			r := firstGeneration(t, registry.Options{})
			if network == "unixgram" {
				proctest.OK(t, proctest.ErrorOf(r.ListenPacket(network, path)))
			} else {
				proctest.OK(t, proctest.ErrorOf(r.Listen(network, path)))
			}
			r.Stop(true, errStopped)
			if proctest.Exists(path) {
				t.Fatalf("%s on a dead %s: Stop has not unlinked it", network, left)
			}
		}
	}

	// What callbacks find is replaced, too.
	for _, left := range []string{"unix", "unixgram"} {
		path := filepath.Join(proctest.SocketDir(t), "s")
		dead(t, left, path)
		r := firstGeneration(t, registry.Options{})
		if left == "unix" {
			proctest.OK(t, proctest.ErrorOf(r.ListenWithCallback(left, path, net.Listen)))
		} else {
			proctest.OK(t, proctest.ErrorOf(r.ListenPacketWithCallback(left, path, net.ListenPacket)))
		}
	}

	// What is no socket is nobody's to unlink.
	path := filepath.Join(proctest.SocketDir(t), "file")
	proctest.OK(t, os.WriteFile(path, []byte("x"), 0o600))
	wantInUse(t, "Listen", proctest.ErrorOf(firstGeneration(t, registry.Options{}).Listen("unix", path)))
	if got := string(proctest.Must(os.ReadFile(path))); got != "x" {
		t.Errorf("the file holds %q", got)
	}
}

// A listener has the same type and keep-alive parameters in every generation.
func TestListenerTypes(t *testing.T) {
	callback := func(network, addr string) (net.Listener, error) { return net.Listen(network, addr) }
	for what, config := range map[string]net.ListenConfig{
		"none":       {},
		"idle":       {KeepAlive: 42e9},
		"off":        {KeepAlive: -1},
		"configured": {KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 7e9}},
	} {
		t.Run(what, func(t *testing.T) {
			opts := registry.Options{ListenConfig: config}
			types := func(r *registry.Registry) (all []string) {
				for _, ln := range []net.Listener{
					proctest.Must(r.Listen("tcp", "127.0.0.1:0")),
					proctest.Must(r.ListenWithCallback("tcp", "localhost:0", callback)),
				} {
					all = append(all, fmt.Sprintf("%T %s", ln, keepAlive(t, ln)))
				}
				return all
			}
			r := firstGeneration(t, opts)
			first := types(r)
			if second := types(child(t, r, opts)); fmt.Sprint(first) != fmt.Sprint(second) {
				t.Errorf("generation 1: %q, generation 2: %q", first, second)
			}
			if first[0] != first[1] {
				t.Errorf("Listen: %q, ListenWithCallback: %q", first[0], first[1])
			}

			closed := proctest.Must(r.Listen("tcp", "127.0.0.2:0"))
			proctest.OK(t, closed.Close())
			conn, err := closed.Accept()
			proctest.WantError(t, "Accept", err, net.ErrClosed)
			if conn != nil {
				t.Errorf("accepted %v", conn)
			}
			path := filepath.Join(proctest.SocketDir(t), "s")
			local := proctest.Must(r.Listen("unix", path))
			inherited := proctest.Must(child(t, r, opts).Listen("unix", path))
			for _, ln := range []net.Listener{local, inherited} {
				if _, ok := ln.(*net.UnixListener); !ok {
					t.Errorf("a Unix listener is a %T", ln)
				}
			}
		})
	}
}

// keepAlive returns the options of a connection that ln accepts.
func keepAlive(t *testing.T, ln net.Listener) (options string) {
	proctest.Dial(t, 1, ln.Addr())
	conn := proctest.Opened[net.Conn](t)(ln.Accept())
	proctest.OK(t, descriptor.Control(conn.(syscall.Conn), func(fd uintptr) error {
		enabled, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE)
		interval, intervalErr := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)
		if options = "off"; enabled != 0 {
			options = fmt.Sprintf("every %d s", interval)
		}
		return errors.Join(err, intervalErr)
	}))
	return options
}

// An abstract socket has no file that its Close could unlink.
func TestHiddenUnlinkAbstract(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	ln := proctest.Opened[net.Listener](t)(net.Listen("unix", "@"+proctest.SocketDir(t)))
	proctest.OK(t, r.AddListener("unix", "a", hidesUnlink{ln}, true))
}

// A socket that package net cannot open is refused.
func TestForeignSockets(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	for what, open := range map[string]func() (int, error){
		"netlink": func() (int, error) { return unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE) },
		"vsock":   func() (int, error) { return unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0) },
		"packet":  func() (int, error) { return unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0) },
		"file":    func() (int, error) { return unix.Open(os.DevNull, unix.O_RDWR, 0) },
	} {
		fd, err := open()
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EPERM) {
			t.Logf("%s: %v", what, err)
			continue
		}
		proctest.OK(t, err)
		file := proctest.Opened[*os.File](t)(os.NewFile(uintptr(fd), what), nil)
		for kind, err := range map[string]error{
			"listener":    r.AddListener(what, "a", fdListener{file: file}, true),
			"packet conn": r.AddPacketConn(what, "a", fdPacketConn{file: file}, true),
			"connection":  r.AddConn(what, "a", fdConn{file: file}),
		} {
			if err == nil {
				t.Errorf("a %s %s is accepted", what, kind)
				continue
			}
			wantText(t, what, err.Error(), kind, "AddFile")
		}
		proctest.OK(t, r.AddFile(what, file))
	}
	c := child(t, r, registry.Options{})
	if files, err := c.Files(); err != nil || len(files) < 2 {
		t.Errorf("the child gets %v, %v", files, err)
	}
}

// A socket that package net can open is accepted, and opened.
func TestKnownSockets(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	proctest.OK(t, err)
	unix.Close(pair[1])
	file := os.NewFile(uintptr(pair[0]), "")
	conn := proctest.Opened[net.Conn](t)(net.FileConn(file))
	file.Close()
	proctest.OK(t, r.AddConn("unix", "pair", conn.(registry.Conn)))
	raw, rawErr := net.ListenPacket("ip4:icmp", "127.0.0.1")
	if rawErr == nil {
		proctest.OK(t, r.AddPacketConn("ip4:icmp", "127.0.0.1", raw.(registry.PacketConn), true))
		raw.Close()
	}

	c := child(t, r, registry.Options{})
	if conn, err := c.Conn("unix", "pair"); conn == nil || err != nil {
		t.Errorf("the pair: %v, %v", conn, err)
	}
	if rawErr == nil {
		if conn, err := c.PacketConn("ip4:icmp", "127.0.0.1"); conn == nil || err != nil {
			t.Errorf("the raw socket: %v, %v", conn, err)
		}
	}
}

// A new socket that shares the address of an inherited one can lose connections.
func TestSharedPortIsWarnedOf(t *testing.T) {
	var opts registry.Options
	book := logTo(&opts.Logger)
	opts.ListenConfig.Control = func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}), err)
	}
	r := firstGeneration(t, opts)
	addrs := map[string]string{"tcp": "127.0.0.1:0", "udp": "127.0.0.1:0"}
	listen := func(r *registry.Registry) {
		ln := proctest.Must(r.Listen("tcp", addrs["tcp"]))
		conn := proctest.Must(r.ListenPacket("udp", addrs["udp"]))
		addrs["tcp"], addrs["udp"] = ln.Addr().String(), conn.LocalAddr().String()
	}
	listen(r)
	listen(r) // in the first generation there is nothing to lose
	c := child(t, r, opts)
	listen(c)
	listen(c)
	proctest.OK(t, proctest.ErrorOf(c.Listen("tcp", "127.0.0.1:0")))
	if text := logged(book); text != "" {
		t.Errorf("logged %s", text)
	}
	listen(c)
	wantText(t, "log", logged(book), "shares the address", "listener:tcp:"+addrs["tcp"], "packet:udp:"+addrs["udp"])
	c.TakeCharge()
	listen(c)
	if text := logged(book); text != "" {
		t.Errorf("in charge, logged %s", text)
	}
}

// The queue is as long as the system allows now, and keeps the connections in it. A
// socket that the manager has opened is left as it is.
func TestListenAgain(t *testing.T) {
	for _, network := range []string{"unix", "unixpacket"} {
		for _, manager := range []string{"nobody", "stores", "opened"} {
			t.Run(fmt.Sprint(network, " that the manager ", manager), func(t *testing.T) {
				path := filepath.Join(proctest.SocketDir(t), "s")
				r := firstGeneration(t, registry.Options{})
				ln := proctest.Must(r.Listen(network, path))
				proctest.OK(t, descriptor.Control(ln.(syscall.Conn), func(fd uintptr) error { return unix.Listen(int(fd), 0) }))
				c := childWith(t, r, registry.Options{}, func(e *nametable.Entry) {
					switch manager {
					case "stores":
						e.FDName = nametable.StoreName(e.Name)
					case "opened":
						e.FDName = "web.socket"
					}
				})
				inherited := proctest.Must(c.Listen(network, path))
				first := proctest.Dial(t, 1, ln.Addr())
				wantFull(t, network, path)
				c.TakeCharge()
				if manager == "opened" {
					wantFull(t, network, path)
				} else {
					proctest.Dial(t, 5, ln.Addr())
				}
				accepted := proctest.Opened[net.Conn](t)(inherited.Accept())
				proctest.WantOpen(t, "the one that waited", accepted, first[0])
			})
		}
	}
}

func wantFull(t *testing.T, network, path string) {
	t.Helper()
	conn, err := net.Dial(network, path)
	proctest.WantError(t, "a queue of one holds two", err, unix.EAGAIN)
	if err == nil {
		conn.Close()
	}
}

// What a crashed process has left with the manager has a name, and nothing else.
func TestStoredSocketFile(t *testing.T) {
	for _, test := range []struct {
		story   string
		prefix  string // of the address
		lose    func(dir, path string) error
		claimed bool
	}{
		{"there", "", func(_, _ string) error { return nil }, true},
		{"gone", "", func(_, path string) error { return os.Remove(path) }, false},
		{"unseen", "", func(dir, _ string) error { return os.Rename(dir, dir+"-away") }, true},
		{"abstract", "@", func(_, _ string) error { return nil }, true},
	} {
		t.Run(test.story, func(t *testing.T) {
			dir := proctest.SocketDir(t)
			t.Cleanup(func() { os.RemoveAll(dir + "-away") })
			path := test.prefix + filepath.Join(dir, "s")
			crashed := firstGeneration(t, registry.Options{})
			proctest.OK(t, proctest.ErrorOf(crashed.Listen("unix", path)))
			c := childWith(t, crashed, registry.Options{}, func(e *nametable.Entry) {
				*e = nametable.Entry{Name: e.Name, FDName: nametable.StoreName(e.Name)}
			})
			crashed.HandOver(errStopped)
			proctest.OK(t, test.lose(dir, path))
			proctest.OK(t, c.DescribeStored())
			if ln := proctest.Must(c.Listener("unix", path)); (ln != nil) != test.claimed {
				t.Errorf("claimed %v", ln)
			}
			c.Stop(false, errStopped)
			if test.story == "there" && !proctest.Exists(path) {
				t.Error("a process that was not in charge has unlinked the file")
			}
		})
	}
}
