package registry

import (
	"net"
	"os"
	"strings"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
)

// An entry is one descriptor in the registry. The Entry that it has from the name
// table is replaced, never changed.
type entry struct {
	*nametable.Entry

	// The registry owns fd. It has no file before an upgrade needs one, because
	// os.NewFile registers non-blocking descriptors with the network poller, and
	// a socket that is registered twice wakes the process twice per event.
	fd     uintptr
	osFile *os.File // of fd, once it was passed on

	conn Conn // a claimed connection, which its caller owns; it has no fd

	claimed   bool // or added by this process
	inherited bool // as opposed to added by this process

	file     *socketFile // of a Unix socket that has one
	unlinker unlinker    // the Unix listener whose duty to unlink that file the registry took
}

// names returns all names by which e can be claimed.
func (e *entry) names() []nametable.Name {
	names := []nametable.Name{e.Name}
	if e.BoundAddr != "" {
		names = append(names, nametable.Name{Kind: e.Kind, Network: e.Network, Addr: e.BoundAddr})
	}
	// The names in the manager's store come and go, and no caller uses them.
	if e.FDName != "" && !nametable.IsStoreName(e.FDName) && e.Network != ManagerNetwork && e.Kind != nametable.File {
		names = append(names, nametable.Name{Kind: e.Kind, Network: ManagerNetwork, Addr: e.FDName})
	}
	return names
}

// setFDName sets what the service manager calls e.
func (e *entry) setFDName(fdName string) {
	if e.FDName != fdName {
		e.Entry = e.With(func(e *nametable.Entry) { e.FDName = fdName })
	}
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

// socket returns what the kernel says about e.
func (e *entry) socket() (s descriptor.Socket, err error) {
	err = e.control(func(fd uintptr) error {
		s, err = descriptor.IdentifySocket(fd)
		return err
	})
	return s, err
}

// fileForChild returns e as a file. The caller closes it if it is borrowed.
func (e *entry) fileForChild() (file *os.File, borrowed bool, err error) {
	if e.conn != nil {
		file, err = e.duplicate("")
		return file, true, err
	}
	if e.osFile == nil {
		e.osFile = os.NewFile(e.fd, "")
	}
	return e.osFile, false, nil
}

func (e *entry) close() error {
	switch {
	case e.conn != nil:
		return nil
	case e.osFile != nil:
		return e.osFile.Close()
	default:
		return descriptor.Close(e.fd)
	}
}

// describe records what the kernel chose for a socket that is bound to addr, and its
// Unix socket file if it has one.
func (e *entry) describe(addr net.Addr, files *socketFiles) {
	if addr == nil {
		return
	}
	e.Entry = e.With(func(table *nametable.Entry) {
		if leavesOpen(e.Network, e.Addr) {
			table.BoundAddr = addr.String()
		}
		if bound, ok := addr.(*net.UnixAddr); ok {
			table.Path, e.file = files.find(bound.Name, e.Addr)
		}
	})
}

// leavesOpen reports whether addr asks the kernel to choose.
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
