//go:build unix

package registry

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/proctest"
)

// A process that does not call LockDir has bound the path after it was found dead.
func TestUnlinkAsidePutsBack(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	ln := proctest.Opened[net.Listener](t)(net.Listen("unix", path))
	before := proctest.Must(os.Lstat(path))
	if unlinkAside(path) {
		t.Error("a socket that is open was unlinked")
	}
	if now, err := os.Lstat(path); err != nil || !os.SameFile(before, now) {
		t.Errorf("it is not where it was: %v", err)
	}
	proctest.Dial(t, 1, ln.Addr())
	proctest.Opened[net.Conn](t)(ln.Accept())
	if left := proctest.Must(os.ReadDir(filepath.Dir(path))); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

// The kernel names an interface by its number, and package net by its name.
func TestNamedZone(t *testing.T) {
	links := proctest.Must(net.Interfaces())
	if len(links) == 0 {
		t.Skip("no interfaces")
	}
	ip := netip.MustParseAddr("fe80::1")
	for _, test := range []struct{ zone, want string }{
		{strconv.Itoa(links[0].Index), links[0].Name},
		{links[0].Name, links[0].Name},
		{"2147483647", "2147483647"},
		{"", ""},
	} {
		if got := withNamedZone(ip.WithZone(test.zone)); got != ip.WithZone(test.want) {
			t.Errorf("%q: got %v", test.zone, got)
		}
	}
}

func TestIsInTheWay(t *testing.T) {
	tcp := addrKey{network: "tcp", port: 80}
	local := addrKey{network: "unix", path: "/run/s"}
	for _, test := range []struct {
		network, addr string
		of            addrKey
		want          bool
	}{
		{"tcp", ":80", tcp, true},
		{"tcp", ":81", tcp, false},
		{"udp", ":80", tcp, false},
		{"unix", "/run/s", local, true},
		{"unixpacket", "/run/s", local, true},
		{"unix", "/run/t", local, false},
		{"unix", "/run/s", addrKey{network: "tcp", path: "/run/s"}, false},
	} {
		want, ok := parseListenAddr(nametable.Name{Kind: nametable.Listener, Network: test.network, Addr: test.addr})
		if !ok {
			t.Fatalf("%s %s means no socket", test.network, test.addr)
		}
		if got := want.isInTheWay(test.of); got != test.want {
			t.Errorf("%v is in the way of %s %s: %v", test.of, test.network, test.addr, got)
		}
	}
}

// A file of descriptor 0, if nobody keeps it, would be closed by the garbage collector.
func TestDuplicateNothing(t *testing.T) {
	e := newEntry(nametable.File, "a", "")
	e.fd = 1 << 30
	if file, err := e.duplicate("a"); file != nil || err == nil {
		t.Errorf("a duplicate of nothing: %v, %v", file, err)
	}
}

// A process with the stub of an Upgrader has no registry.
func TestListenersOfNone(t *testing.T) {
	before := current.Swap(nil)
	defer current.Store(before)
	if got := Listeners(); got == nil || len(got) > 0 {
		t.Errorf("got %q", got)
	}
}
