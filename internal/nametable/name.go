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

// A Name is what callers know a descriptor by. A file's is its Network, and it has no
// Addr.
type Name struct {
	Kind, Network, Addr string
}

func (n Name) String() string { return n.Kind + ":" + n.Network + ":" + n.Addr }

// An Entry is what the table says about one descriptor. An Entry that a table holds
// is not changed any more, because a child that is being started may be reading it.
type Entry struct {
	Name
	BoundAddr string // the address that the kernel chose, where Addr left it open
	Path      string // absolute, of a Unix socket's file
	FileID    string // what tells its inode from others, empty if it is not there any more
	FDName    string // what the service manager calls it, if it passed or stores it
}

// With returns a copy of e that change has changed.
func (e *Entry) With(change func(*Entry)) *Entry {
	changed := *e
	change(&changed)
	return &changed
}
