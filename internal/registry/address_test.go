//go:build unix

package registry_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/registry"
)

// An address is [network] and address, in which PORT is a port that is free.
type address [2]string

func (a address) at(port string) (network, addr string) {
	return a[0], strings.ReplaceAll(a[1], "PORT", port)
}

// An address finds the sockets that it can stand for, and no other.
func TestSpellings(t *testing.T) {
	if ln, err := net.Listen("tcp", "[::1]:0"); err != nil {
		t.Skip("no IPv6: ", err)
	} else {
		ln.Close()
	}
	for _, test := range []struct {
		before, after address
		found         bool
	}{
		{address{"tcp", ":PORT"}, address{"tcp", "0.0.0.0:PORT"}, true},
		{address{"tcp", ":PORT"}, address{"tcp", "[::]:PORT"}, true},
		{address{"tcp", ":PORT"}, address{"tcp", "*:PORT"}, true},
		{address{"tcp", ":PORT"}, address{"tcp", ":0PORT"}, true},
		{address{"tcp", ":PORT"}, address{"tcp4", ":PORT"}, true},
		{address{"tcp", ":PORT"}, address{"tcp6", "[0:0::0]:PORT"}, true},
		{address{"tcp", "0.0.0.0:PORT"}, address{"tcp", ":PORT"}, true},
		{address{"tcp", "localhost:PORT"}, address{"tcp", "127.0.0.1:PORT"}, true},
		{address{"tcp", "127.0.0.1:PORT"}, address{"tcp", "localhost:PORT"}, true},
		{address{"tcp", "127.0.0.1:PORT"}, address{"tcp", "[::ffff:127.0.0.1]:PORT"}, true},
		{address{"tcp", "[::1]:PORT"}, address{"tcp6", "[0:0::0:1]:PORT"}, true},
		{address{"tcp", "name"}, address{"tcp", "127.0.0.1:PORT"}, true},
		{address{"udp", ":PORT"}, address{"udp", "0.0.0.0:PORT"}, true},
		{address{"udp4", "localhost:PORT"}, address{"udp", "127.0.0.1:PORT"}, true},

		{address{"tcp", ":PORT"}, address{"tcp", "127.0.0.1:PORT"}, false},
		{address{"tcp", ":PORT"}, address{"tcp", "localhost:PORT"}, false},
		{address{"tcp", "127.0.0.1:PORT"}, address{"tcp", ":PORT"}, false},
		{address{"udp", ":PORT"}, address{"udp", "127.0.0.1:PORT"}, false},
	} {
		t.Run(fmt.Sprint(test.before, " to ", test.after), func(t *testing.T) {
			r := firstGeneration(t, registry.Options{})
			bound := listenAs(t, r, test.before)
			_, port, err := net.SplitHostPort(bound.String())
			proctest.OK(t, err)

			c := child(t, r, registry.Options{})
			network, addr := test.after.at(port)
			var got net.Addr
			if strings.HasPrefix(network, "udp") {
				var conn net.PacketConn
				if conn, err = c.ListenPacket(network, addr); err == nil {
					got = conn.LocalAddr()
				}
			} else {
				var ln net.Listener
				if ln, err = c.Listen(network, addr); err == nil {
					got = ln.Addr()
				}
			}

			if test.found {
				proctest.OK(t, err)
				if got.String() != bound.String() {
					t.Errorf("found %v, want %v", got, bound)
				}
				return
			}
			wantInUse(t, "Listen", err)
			wantText(t, "Listen", fmt.Sprint(err), "inherited and not claimed: ", test.before[0]+":"+strings.ReplaceAll(test.before[1], "PORT", port))
		})
	}
}

// listenAs adds a socket on a port that is free, as if that had been asked for.
func listenAs(t *testing.T, r *registry.Registry, a address) net.Addr {
	t.Helper()
	network, addr := a.at("0")
	if addr == "name" {
		addr = "127.0.0.1:0"
	}
	if strings.HasPrefix(network, "udp") {
		conn := proctest.Opened[net.PacketConn](t)(net.ListenPacket(network, addr))
		_, port, _ := net.SplitHostPort(conn.LocalAddr().String())
		network, addr = a.at(port)
		proctest.OK(t, r.AddPacketConn(network, addr, conn.(registry.PacketConn), true))
		return conn.LocalAddr()
	}
	ln := proctest.Opened[net.Listener](t)(net.Listen(network, addr))
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	network, addr = a.at(port)
	proctest.OK(t, r.AddListener(network, addr, ln.(registry.Listener), true))
	return ln.Addr()
}

// A socket of one address family is not found by an address of the other, and one of
// the host's own addresses not by another.
func TestOtherAddresses(t *testing.T) {
	for _, test := range []struct{ before, after address }{
		{address{"tcp4", "0.0.0.0:PORT"}, address{"tcp6", "[::]:PORT"}},
		{address{"tcp6", "[::]:PORT"}, address{"tcp4", ":PORT"}},
		{address{"udp4", "127.0.0.1:PORT"}, address{"udp6", "localhost:PORT"}},
		{address{"tcp", "127.0.0.2:PORT"}, address{"tcp", "127.0.0.1:PORT"}},
		{address{"tcp", "127.0.0.2:PORT"}, address{"tcp", "localhost:PORT"}},
		{address{"tcp", "[::1]:PORT"}, address{"tcp4", "localhost:PORT"}},
		{address{"tcp", "127.0.0.1:PORT"}, address{"tcp", ""}},
		{address{"tcp", "127.0.0.1:PORT"}, address{"systemd", ""}},
	} {
		r := firstGeneration(t, registry.Options{})
		_, port, err := net.SplitHostPort(listenAs(t, r, test.before).String())
		proctest.OK(t, err)
		c := child(t, r, registry.Options{})
		network, addr := test.after.at(port)
		ln := proctest.Must(c.Listener(network, addr))
		conn := proctest.Must(c.PacketConn(network, addr))
		if ln != nil || conn != nil {
			t.Errorf("%v is found as %v", test.before, test.after)
		}
	}
}

// Of two sockets on all addresses, each is found by its own family's.
func TestWildcards(t *testing.T) {
	for addr, want := range map[string]string{"[::]:": "[::]:", "0.0.0.0:": "0.0.0.0:", ":": "0.0.0.0:"} {
		for _, networks := range [][]string{{"tcp4", "tcp6"}, {"tcp6", "tcp4"}} {
			r := firstGeneration(t, registry.Options{})
			first := proctest.Must(r.Listen(networks[0], ":0"))
			_, port, _ := net.SplitHostPort(first.Addr().String())
			if err := proctest.ErrorOf(r.Listen(networks[1], ":"+port)); err != nil {
				t.Skip("no such port of both families: ", err)
			}
			if ln := proctest.Must(child(t, r, registry.Options{}).Listener("tcp", addr+port)); ln == nil || ln.Addr().String() != want+port {
				t.Errorf("%v: %s finds %v, want %s", networks, addr+port, ln, want+port)
			}
		}
	}
}

// A Unix socket is found by any path to its file.
func TestUnixSpellings(t *testing.T) {
	dir := proctest.Must(filepath.EvalSymlinks(proctest.SocketDir(t)))
	t.Chdir(dir)
	proctest.OK(t, os.Mkdir("sub", 0o700))
	proctest.OK(t, os.Symlink("sub", "link"))
	proctest.OK(t, os.Symlink("s", "alias"))
	for _, test := range []struct{ before, after string }{
		{dir + "/s", "s"},
		{"s", dir + "/s"},
		{"./s", "s"},
		{dir + "/s", dir + "//sub/../s"},
		{dir + "/sub/s", dir + "/link/s"},
		{dir + "/link/s", "sub/s"},
		{dir + "/s", "alias"},
		{"@tableflip " + dir, "\x00tableflip " + dir},
	} {
		r := firstGeneration(t, registry.Options{})
		proctest.OK(t, proctest.ErrorOf(r.Listen("unix", test.before)))
		c := child(t, r, registry.Options{})
		if ln, err := c.Listener("unix", test.after); ln == nil || err != nil {
			t.Errorf("%q to %q: %v, %v", test.before, test.after, ln, err)
		}
		r.Stop(true, errStopped)
	}
}

// So is one that was renamed into place.
func TestRenamedSpellings(t *testing.T) {
	dir := proctest.Must(filepath.EvalSymlinks(proctest.SocketDir(t)))
	t.Chdir(dir)
	r := firstGeneration(t, registry.Options{})
	ln := proctest.Opened[net.Listener](t)(net.Listen("unix", dir+"/new"))
	proctest.OK(t, os.Rename("new", "s"))
	proctest.OK(t, r.AddListener("unix", dir+"/s", ln.(registry.Listener), true))
	c := child(t, r, registry.Options{})
	if ln, err := c.Listener("unix", "s"); ln == nil || err != nil {
		t.Errorf("found %v, %v", ln, err)
	}
}

// Names are looked for before addresses, and an open port finds only its own name.
func TestNamesBeforeAddresses(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	var want []string
	for range 3 {
		want = append(want, proctest.Must(r.Listen("tcp", "localhost:0")).Addr().String())
	}
	// Spelled otherwise than what comes after it, which is the same socket.
	first := proctest.Must(r.Listen("tcp", "127.0.0.1:0")).(registry.Listener)
	proctest.OK(t, r.AddListener("tcp", first.Addr().String(), first, true))

	c := child(t, r, registry.Options{})
	if ln := proctest.Must(c.Listener("tcp", "127.0.0.2:0")); ln != nil {
		t.Errorf("another open port is %v", ln.Addr())
	}
	for i := range want {
		if ln := proctest.Must(c.Listener("tcp", "localhost:0")); ln == nil || ln.Addr().String() != want[i] {
			t.Errorf("listener %d is %v, want %s", i, ln, want[i])
		}
	}
	for _, addr := range []string{first.Addr().String(), "127.0.0.1:0"} {
		if ln := proctest.Must(c.Listener("tcp", addr)); ln == nil {
			t.Errorf("nothing is found as %s", addr)
		}
	}
}

// What was claimed by another name is removed by that name, and passed on by it.
func TestClaimedNames(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	bound := listenAs(t, r, address{"tcp", "127.0.0.1:PORT"})
	_, port, err := net.SplitHostPort(bound.String())
	proctest.OK(t, err)
	c := child(t, r, registry.Options{})
	proctest.OK(t, proctest.ErrorOf(c.Listen("tcp", "localhost:"+port)))
	proctest.WantError(t, "RemoveListener by its former name", c.RemoveListener("tcp", bound.String()), os.ErrNotExist)
	proctest.OK(t, c.RemoveListener("tcp", "localhost:"+port))
	proctest.OK(t, proctest.ErrorOf(c.Listen("tcp", "localhost:"+port)))
	c.TakeCharge()
	entries, _, release, err := c.FreezeForChild()
	proctest.OK(t, err)
	release()
	c.Unfreeze()
	if want := (nametable.Name{Kind: nametable.Listener, Network: "tcp", Addr: "localhost:" + port}); len(entries) != 1 || entries[0].Name != want {
		t.Errorf("passed on as %v, want %v", entries[0].Name, want)
	}
	proctest.OK(t, c.RemoveListener("tcp", "localhost:"+port))
}

// A connection's name is not its address.
func TestConnsAreNotFoundByAddress(t *testing.T) {
	server, _ := proctest.Connect(t)
	r := firstGeneration(t, registry.Options{})
	proctest.OK(t, r.AddConn("tcp", ":0", server))
	c := child(t, r, registry.Options{})
	if conn, err := c.Conn("tcp", server.LocalAddr().String()); conn != nil || err != nil {
		t.Errorf("found %v, %v", conn, err)
	}
}

// A claim after TakeCharge is an error until the parent has exited.
func TestLateClaims(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	r := firstGeneration(t, registry.Options{})
	tcp := proctest.Must(r.Listen("tcp", "127.0.0.1:0"))
	udp := proctest.Must(r.ListenPacket("udp", "127.0.0.1:0"))
	local := proctest.Must(r.Listen("unix", path))
	proctest.OK(t, r.AddFile("file", os.Stderr))
	_, port, _ := net.SplitHostPort(tcp.Addr().String())
	calls := map[string]func(*registry.Registry) error{
		"Listen by its name":    func(r *registry.Registry) error { return proctest.ErrorOf(r.Listen("tcp", "127.0.0.1:0")) },
		"Listen by its address": func(r *registry.Registry) error { return proctest.ErrorOf(r.Listen("tcp", tcp.Addr().String())) },
		"Listen otherwise":      func(r *registry.Registry) error { return proctest.ErrorOf(r.Listen("tcp", "localhost:"+port)) },
		"Listener":              func(r *registry.Registry) error { return proctest.ErrorOf(r.Listener("tcp", "127.0.0.1:0")) },
		"ListenPacket": func(r *registry.Registry) error {
			return proctest.ErrorOf(r.ListenPacket("udp", udp.LocalAddr().String()))
		},
		"Listen on a file": func(r *registry.Registry) error { return proctest.ErrorOf(r.Listen("unix", path)) },
		"File":             func(r *registry.Registry) error { return proctest.ErrorOf(r.File("file")) },
	}
	c := child(t, r, registry.Options{})
	c.TakeCharge()
	for what, call := range calls {
		if err := call(c); err == nil {
			t.Errorf("%s: no error", what)
		} else {
			wantText(t, what, err.Error(), "was inherited", "not claimed before Ready", "closed")
		}
	}
	proctest.OK(t, proctest.ErrorOf(c.Listen("tcp", "localhost:0"))) // another
	proctest.OK(t, tcp.Close())
	proctest.OK(t, udp.Close())
	proctest.OK(t, local.Close())
	r.HandOver(errStopped)

	// It is nobody's any more.
	c.ForgetUnclaimed()
	for _, what := range []string{"Listen by its address", "ListenPacket", "Listen on a file", "File"} {
		if err := calls[what](c); err != nil {
			t.Errorf("%s, once the parent has exited: %v", what, err)
		}
	}
}

// A socket whose file is gone is not claimed, and Listen binds a new one.
func TestLostSocketFile(t *testing.T) {
	for what, lose := range map[string]func(path string) error{
		"removed": os.Remove,
		"replaced by a dead one": func(path string) error {
			_ = os.Remove(path)
			ln, err := net.Listen("unix", path)
			if err == nil {
				ln.(*net.UnixListener).SetUnlinkOnClose(false)
				ln.Close()
			}
			return err
		},
	} {
		t.Run(what, func(t *testing.T) {
			path := filepath.Join(proctest.SocketDir(t), "s")
			var opts registry.Options
			book := logTo(&opts.Logger)
			r := firstGeneration(t, opts)
			proctest.OK(t, proctest.ErrorOf(r.Listen("unix", path)))
			proctest.OK(t, lose(path))

			// A child that fails leaves nothing behind.
			failed := child(t, r, registry.Options{})
			proctest.OK(t, proctest.ErrorOf(failed.Listen("unix", path)))
			failed.Stop(false, errStopped)
			if proctest.Exists(path) {
				t.Error("a child that failed has left its file")
			}

			c := child(t, r, opts)
			wantText(t, "log", logged(book), "listener:unix:"+path, "is gone")
			if ln := proctest.Must(c.Listener("unix", path)); ln != nil {
				t.Error("the listener that nobody can reach is claimed")
			}
			ln := proctest.Must(c.Listen("unix", "./"+relative(t, path)))
			if text := logged(book); text != "" {
				t.Errorf("logged %s", text)
			}
			c.TakeCharge()
			proctest.Dial(t, 1, &net.UnixAddr{Net: "unix", Name: path})
			proctest.Opened[net.Conn](t)(ln.Accept())
			c.Stop(true, errStopped)
			if proctest.Exists(path) {
				t.Error("Stop has not unlinked the new file")
			}
		})
	}
}

func relative(t *testing.T, path string) string {
	t.Chdir(filepath.Dir(path))
	return filepath.Base(path)
}

// Nor is one whose file was lost in a later generation than the one that bound it.
func TestLostSocketFileInherited(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	r := firstGeneration(t, registry.Options{})
	proctest.OK(t, proctest.ErrorOf(r.Listen("unix", path)))
	c := child(t, r, registry.Options{})
	proctest.OK(t, proctest.ErrorOf(c.Listen("unix", path)))
	c.TakeCharge()
	proctest.OK(t, os.Remove(path))
	if ln := proctest.Must(child(t, c, registry.Options{}).Listener("unix", path)); ln != nil {
		t.Error("the listener that nobody can reach is claimed")
	}
}

// Another process that has bound the path keeps it.
func TestSocketFileOfAnother(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	r := firstGeneration(t, registry.Options{})
	proctest.OK(t, proctest.ErrorOf(r.Listen("unix", path)))
	proctest.OK(t, os.Remove(path))
	proctest.Opened[net.Listener](t)(net.Listen("unix", path))
	c := child(t, r, registry.Options{})
	err := proctest.ErrorOf(c.Listen("unix", path))
	wantInUse(t, "Listen", err)
	wantText(t, "Listen", fmt.Sprint(err), "inherited and not claimed", path)
	c.TakeCharge()
	if !proctest.Exists(path) {
		t.Error("the file of another is gone")
	}
}

// In a chroot(2) not even the directory is there: the inherited socket is claimed.
func TestSocketFileUnseen(t *testing.T) {
	for _, blocked := range []bool{false, true} {
		dir := proctest.SocketDir(t)
		path := filepath.Join(dir, "s")
		r := firstGeneration(t, registry.Options{})
		proctest.OK(t, proctest.ErrorOf(r.Listen("unix", path)))
		proctest.OK(t, os.Rename(dir, dir+"-away"))
		t.Cleanup(func() { os.RemoveAll(dir + "-away") })
		if blocked { // nor can it be looked for
			proctest.OK(t, os.WriteFile(dir, nil, 0o600))
		}
		c := child(t, r, registry.Options{})
		if ln := proctest.Must(c.Listener("unix", "/nowhere/to/be/found/s")); ln != nil {
			t.Errorf("another path finds %v", ln.Addr())
		}
		if ln, err := c.Listen("unix", path); err != nil || ln.Addr().String() != path {
			t.Errorf("inherited %v, %v", ln, err)
		}
	}
}
