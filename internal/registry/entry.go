package registry

import (
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
)

// An entry is one descriptor in the registry. The Entry that it has from the name
// table is replaced, never changed.
type entry struct {
	*nametable.Entry
	order int // in which entries were added

	// The registry owns fd, and makes no file of it: os.NewFile registers non-blocking
	// descriptors with the network poller, and a socket that is registered twice wakes
	// the process twice per event.
	fd   uintptr
	conn Conn // a claimed connection, which its caller owns; it has no fd

	claimed   bool // or added by this process
	inherited bool // as opposed to added by this process

	bound *descriptor.Socket // what the kernel says about fd, once that was asked
	file  *socketFile        // of a Unix socket that has one
	owner syscall.Conn       // the caller's listener or packet conn, if it has such a file
}

func newEntry(kind, network, addr string) *entry {
	return &entry{Entry: &nametable.Entry{Name: nametable.Name{Kind: kind, Network: network, Addr: addr}}}
}

// names returns all names by which e can be claimed.
func (e *entry) names() []nametable.Name {
	names := []nametable.Name{e.Name}
	if e.BoundAddr != "" {
		names = append(names, nametable.Name{Kind: e.Kind, Network: e.Network, Addr: e.BoundAddr})
	}
	// The names in the manager's store come and go, and no caller uses them.
	if e.byManager() && e.Network != ManagerNetwork && e.Kind != nametable.File {
		names = append(names, nametable.Name{Kind: e.Kind, Network: ManagerNetwork, Addr: e.FDName})
	}
	return names
}

// byManager reports whether the service manager has opened e, as opposed to storing it.
func (e *entry) byManager() bool { return e.FDName != "" && !nametable.IsStoreName(e.FDName) }

// isAddressed reports whether e can be found by the address that it is bound to.
func (e *entry) isAddressed() bool {
	return e.Kind == nametable.Listener || e.Kind == nametable.PacketConn
}

// isLost reports whether e is a Unix socket that nobody can reach any more, because
// its file is gone.
func (e *entry) isLost() bool { return e.file != nil && e.file.id == "" }

// isClaimable reports whether e can be claimed.
func (e *entry) isClaimable() bool { return !e.claimed && !e.isLost() }

// setFDName sets what the service manager calls e.
func (e *entry) setFDName(fdName string) {
	if e.FDName != fdName {
		e.Entry = e.With(func(e *nametable.Entry) { e.FDName = fdName })
	}
}

// forChild returns e as the name table has it for the next child.
func (e *entry) forChild() *nametable.Entry {
	var path, id string
	if e.file != nil {
		path, id = e.file.path, e.file.id
		if e.file.isGone() {
			id = ""
		}
	}
	if path != e.Path || id != e.FileID {
		e.Entry = e.With(func(e *nametable.Entry) { e.Path, e.FileID = path, id })
	}
	return e.Entry
}

// control calls use with e's descriptor.
func (e *entry) control(use func(fd uintptr) error) error {
	if e.conn != nil {
		return descriptor.Control(e.conn, use)
	}
	return use(e.fd)
}

// duplicate returns a file of this name for a duplicate of e's descriptor. The
// caller closes it.
func (e *entry) duplicate(name string) (*os.File, error) {
	var file *os.File
	err := e.control(func(fd uintptr) error {
		dup, err := descriptor.Duplicate(fd)
		if err == nil {
			file = os.NewFile(dup, name)
		}
		return err
	})
	return file, err
}

// socket returns what the kernel says about e, which must have a descriptor.
func (e *entry) socket() (descriptor.Socket, error) {
	if e.bound == nil {
		s, err := descriptor.IdentifySocket(e.fd)
		if err != nil {
			return s, err
		}
		e.bound = &s
	}
	return *e.bound, nil
}

func (e *entry) close() error {
	if e.conn != nil {
		return nil
	}
	return descriptor.Close(e.fd)
}

// describe completes an entry that this process adds, and returns an error if no
// child could open it, or if closing source would harm the child.
func (e *entry) describe(source syscall.Conn) error {
	if e.Kind == nametable.File {
		return nil
	}
	s, err := e.socket()
	if err != nil {
		return err
	}
	if !opens(e.Kind, s.Network) {
		return fmt.Errorf("package net makes no %s of such a descriptor, so that no new process could open it: pass it on by AddFile", kindNames[e.Kind])
	}
	if _, ok := source.(unlinker); !ok && e.Kind == nametable.Listener && isPath(s.Path) {
		return fmt.Errorf("%T has no SetUnlinkOnClose, so that its Close could unlink the file %s that the new process serves: add the *net.UnixListener, and wrap it afterwards", source, s.Path)
	}
	e.setBoundAddr(s)
	return nil
}

var kindNames = map[string]string{
	nametable.Listener: "listener", nametable.PacketConn: "packet conn", nametable.Conn: "connection",
}

// opens reports whether package net makes a socket of this kind of one of this network.
func opens(kind, network string) bool {
	switch kind {
	case nametable.Listener:
		return network == "tcp" || isUnix(network)
	case nametable.PacketConn:
		return network == "udp" || network == "ip" || isUnix(network)
	default:
		return network != ""
	}
}

// setOwner records whose socket e is a duplicate of, and takes over the duty to unlink
// its file.
func (e *entry) setOwner(owner syscall.Conn) {
	e.owner = owner
	if u, ok := owner.(unlinker); ok {
		u.SetUnlinkOnClose(false)
	}
}

// refresh has an inherited Unix listener show this process's credentials to clients. It
// leaves those alone that the service manager has opened.
func (e *entry) refresh() error {
	if !e.inherited || e.Kind != nametable.Listener || e.byManager() || strings.HasPrefix(e.Network, "tcp") {
		return nil
	}
	s, err := e.socket()
	if err != nil || !isUnix(s.Network) || !s.Listening {
		return err
	}
	return descriptor.ListenAgain(e.fd)
}

// boundHint names the address that e is bound to, unless it is e's name.
func (e *entry) boundHint() string {
	if e.bound == nil || e.bound.Network == "" || e.Addr == addrOf(*e.bound).String() {
		return ""
	}
	return fmt.Sprintf(" (it is bound to %s)", addrOf(*e.bound))
}

// setBoundAddr records the address that the kernel chose.
func (e *entry) setBoundAddr(s descriptor.Socket) {
	if e.isAddressed() && leavesOpen(e.Network, e.Addr) {
		e.Entry = e.With(func(table *nametable.Entry) { table.BoundAddr = addrOf(s).String() })
	}
}

// addrOf returns what s is bound to.
func addrOf(s descriptor.Socket) net.Addr {
	switch s.Network {
	case "tcp":
		return net.TCPAddrFromAddrPort(s.Bound)
	case "udp":
		return net.UDPAddrFromAddrPort(s.Bound)
	case "ip":
		return &net.IPAddr{IP: s.Bound.Addr().AsSlice(), Zone: s.Bound.Addr().Zone()}
	default:
		return &net.UnixAddr{Net: s.Network, Name: s.Path}
	}
}

// leavesOpen reports whether addr leaves the port, or the name, to the kernel.
func leavesOpen(network, addr string) bool {
	switch base, _, _ := strings.Cut(network, ":"); base {
	case "unix", "unixgram", "unixpacket":
		return addr == ""
	case "tcp", "tcp4", "tcp6", "udp", "udp4", "udp6":
		port := addr[strings.LastIndexByte(addr, ':')+1:]
		return strings.Trim(port, "0") == ""
	}
	return false
}
