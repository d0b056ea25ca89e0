// Package nametable owns what travels from a parent to its child: the names of the
// descriptors that the parent passes, and their encoding as environment variables.
package nametable

// The kinds of descriptors.
const (
	Listener   = "listener"
	PacketConn = "packet"
	Conn       = "conn"
	File       = "fd"
)

// A Name is the name by which callers know a descriptor. A file has its name in Network,
// and no Addr.
type Name struct {
	Kind, Network, Addr string
}

func (n Name) String() string { return n.Kind + ":" + n.Network + ":" + n.Addr }

// An Entry describes one descriptor in the table. An Entry that a table holds is not
// changed any more, because the start of a child may be reading it.
type Entry struct {
	Name
	BoundAddr string // the address that the kernel chose, where Addr left it open
	Path      string // absolute, of a Unix socket's file
	FileID    string // tells its inode from others; empty if the file is gone
	FDName    string // the service manager's name, if it passed or stores the descriptor
}

// With returns a copy of e after change was applied to it.
func (e *Entry) With(change func(*Entry)) *Entry {
	changed := *e
	change(&changed)
	return &changed
}
