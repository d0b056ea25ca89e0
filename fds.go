package tableflip

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// This file owns the duplicates that the registry holds, from the moment that
// a descriptor is inherited or added to the moment that it is passed on, and
// decides who unlinks a Unix socket's file. It knows nothing of processes.

// Listener can be shared between processes.
type Listener interface {
	net.Listener
	syscall.Conn
}

// PacketConn can be shared between processes.
type PacketConn interface {
	net.PacketConn
	syscall.Conn
}

// Conn can be shared between processes.
type Conn interface {
	net.Conn
	syscall.Conn
}

// Fds is the registry of the descriptors that this process got from its parent
// and of those that it will pass on to its child. An Upgrader has one; the zero
// value is not usable.
//
// A network and an address name a listener, packet conn or connection, a string
// names a file; both may be any bytes. The names are compared as they are: a
// new version finds a listener by the same spelling by which the old one added
// it. An address that left the port open (":0") is also found under the address
// that the kernel gave ("127.0.0.1:38249"), and so is an empty Unix address.
//
// The sockets that systemd passes to the first generation are found by what they
// are bound to: ":80", "*:80", "0.0.0.0:80", "[::]:80" and ":http" all find one
// that is bound to port 80 of all addresses, "localhost:80" one on a loopback
// address, and the path one on a Unix socket. No host name is resolved. The
// network "systemd" finds them by their FileDescriptorName (by default, the name of
// their socket unit): Listener("systemd", "web.socket"). From then on they
// are like all others, except that nobody here unlinks their files.
//
// What is inherited is taken, once, by Listen, Listener, File and their kin, and
// is passed on to the next child from then on. What nobody has taken when Ready
// returns is closed. Several descriptors with one name are taken in the order in
// which they were added.
//
// The registry passes on duplicates of its own, so that closing a listener,
// packet conn or file does not keep it from the next child; the Remove methods
// do. The exception is a connection that Conn returned, which is passed on
// while it is open. Descriptors that are passed on share their blocking mode,
// which the registry never changes.
//
// While an upgrade is under way, methods that add or remove a descriptor wait for
// its end, as the new process has got what there was when it began. After a
// successful upgrade all methods fail with ErrUpgraded, and after Stop with
// ErrStopped.
//
// All methods are safe for concurrent use.
type Fds struct {
	listenConfig net.ListenConfig
	logger       *slog.Logger

	mu       sync.Mutex
	entries  []*entry           // in the order in which they were added
	claimed  int                // all entries before this index are used
	byName   map[name]namesakes // nil until named needs it
	blocking *os.File           // see passiveFile
	lens     *os.File           // see through
	inCharge bool               // takeCharge was called
	store    *store             // nil without a service manager
	frozen   chan struct{}      // non-nil during an upgrade, closed at its end
	closed   error              // why there will be no child

	activated bool // the service manager knows inherited entries; set before use
}

// The kinds of descriptors, as they are in the name table.
const (
	kindListener   = "listener"
	kindPacketConn = "packet"
	kindConn       = "conn"
	kindFile       = "fd"
)

// A name is what callers know a descriptor by. A file's is its network.
type name struct {
	kind, network, addr string
}

func (n name) String() string {
	if n.kind == kindFile {
		return n.kind + ":" + n.network + ":"
	}
	return n.kind + ":" + n.network + ":" + n.addr
}

// An entry is one descriptor in the registry, which has it as fd when it was just
// inherited, as conn once that was claimed, and as file otherwise.
type entry struct {
	*descriptor
	fd   uintptr
	file *os.File // passive, and the registry's own
	conn Conn     // the caller's

	used      bool // claimed, or added; what is not used was inherited
	inherited bool // as opposed to created by this process

	socketFile fs.FileInfo // of path, when it was bound or inherited
	parents    bool        // added, with a socket file that a parent created
	unlinker   unlinker    // the Unix listener whose duty to unlink path the registry took
}

type unlinker interface {
	SetUnlinkOnClose(bool)
}

// names returns all names by which e can be claimed.
func (e *entry) names() []name {
	names := []name{e.name}
	if e.given != "" {
		names = append(names, name{e.kind, e.network, e.given})
	}
	// Those in the store come and go, and are nobody's names.
	if e.fdName != "" && !isStored(e.fdName) && e.network != systemdNetwork && e.kind != kindFile {
		names = append(names, name{e.kind, systemdNetwork, e.fdName})
	}
	return names
}

// hasFile reports whether e's Unix socket file is there, and no other socket's has
// taken its place: while e is open, its inode is not used again.
func (e *entry) hasFile() bool {
	if e.path == "" || e.socketFile == nil {
		return false
	}
	now, err := os.Lstat(e.path)
	return err == nil && os.SameFile(now, e.socketFile)
}

// unlink removes e's Unix socket file.
func (e *entry) unlink() error {
	if !e.hasFile() {
		return nil
	}
	if err := os.Remove(e.path); err != nil {
		return fmt.Errorf("tableflip: unlink the Unix socket %s: %w", e.path, err)
	}
	return nil
}

func (e *entry) close() error {
	switch {
	case e.file != nil:
		return e.file.Close()
	case e.conn != nil:
		return nil
	default:
		return closeDescriptor(e.fd)
	}
}

// Namesakes are the entries with one name, in the order in which they were added.
type namesakes struct {
	entries   []*entry
	unclaimed int // those before this index are used
}

// named returns the entries of this name.
func (f *Fds) named(n name) namesakes {
	if f.byName == nil {
		f.byName = make(map[name]namesakes, len(f.entries))
		for _, e := range f.entries {
			f.index(e)
		}
	}
	return f.byName[n]
}

// find returns the first entry of this name that is used, or the first that is not.
func (f *Fds) find(n name, used bool) *entry {
	if !used {
		// A new version mostly claims in the order in which the old one did.
		for f.claimed < len(f.entries) && f.entries[f.claimed].used {
			f.claimed++
		}
		if f.claimed < len(f.entries) && f.entries[f.claimed].name == n {
			return f.entries[f.claimed]
		}
	}
	same := f.named(n)
	i := 0
	if !used {
		i = same.unclaimed
	}
	for i < len(same.entries) && same.entries[i].used != used {
		i++
	}
	if !used && i != same.unclaimed {
		f.byName[n] = namesakes{same.entries, i}
	}
	if i == len(same.entries) {
		return nil
	}
	return same.entries[i]
}

func (f *Fds) index(e *entry) {
	for _, n := range e.names() {
		same := f.byName[n]
		f.byName[n] = namesakes{append(same.entries, e), same.unclaimed}
	}
}

func (f *Fds) insert(e *entry) {
	f.entries = append(f.entries, e)
	if f.byName != nil {
		f.index(e)
	}
}

func (f *Fds) delete(e *entry) {
	isE := func(other *entry) bool { return other == e }
	f.entries = slices.DeleteFunc(f.entries, isE)
	f.claimed = 0
	if f.byName == nil {
		return
	}
	for _, n := range e.names() {
		rest := slices.DeleteFunc(f.byName[n].entries, isE)
		if len(rest) == 0 {
			delete(f.byName, n)
		} else {
			f.byName[n] = namesakes{entries: rest}
		}
	}
}

// unclaim undoes a claim.
func (f *Fds) unclaim(e *entry) {
	e.used = false
	f.claimed = 0
	for _, n := range e.names() {
		if same, ok := f.byName[n]; ok {
			f.byName[n] = namesakes{entries: same.entries}
		}
	}
}

// newFds takes over the descriptors of a name table, which are open from first on,
// unless it returns an error.
func newFds(opts Options, m *manager, first uintptr, inherited []*descriptor) (*Fds, error) {
	f := &Fds{
		logger:  opts.Logger,
		entries: make([]*entry, 0, len(inherited)),
	}
	if m != nil {
		f.store = &store{manager: m, wanted: opts.DescriptorStore}
	}
	if opts.ListenConfig != nil {
		f.listenConfig = *opts.ListenConfig
	}
	entries := make([]entry, len(inherited))
	for i, d := range inherited {
		e := &entries[i]
		*e = entry{descriptor: d, fd: first + uintptr(i), inherited: true}
		if err := setCloseOnExec(e.fd); err != nil {
			return nil, fmt.Errorf("tableflip: inherit descriptor %d, %q: %w", e.fd, e.name, err)
		}
		if e.path != "" {
			e.socketFile, _ = os.Lstat(e.path)
		}
		f.activated = f.activated || e.fdName != ""
		f.insert(e)
	}
	return f, nil
}

// Listen returns a listener inherited from the parent process or from systemd, or
// creates a new one with Options.ListenConfig. It does not wait for the parent to let go of
// it: both accept from the same queue until one of them closes its listener.
//
// The caller owns the listener. A Unix listener's Close does not unlink the
// socket file; Stop does. Where a process that was killed has left one, to which
// nobody listens, it is replaced. An inherited listener is the net package's own type,
// unless Options.ListenConfig sets keep-alive parameters: then it is one that
// embeds it and applies them.
func (f *Fds) Listen(network, addr string) (net.Listener, error) {
	return f.ListenWithCallback(network, addr, func(network, addr string) (net.Listener, error) {
		return bind(f.listenConfig.Listen, network, addr)
	})
}

// bind creates a socket, in the place of a dead one if that has left its file.
func bind[T any](create func(ctx context.Context, network, addr string) (T, error), network, addr string) (T, error) {
	socket, err := create(context.Background(), network, addr)
	if isAddressInUse(err) && unlinkDead(network, addr) {
		socket, err = create(context.Background(), network, addr)
	}
	return socket, err
}

// unlinkDead unlinks the file of a Unix socket that no process has open. One
// that was killed leaves its file, and that of a failed upgrade must not fail the
// next one.
func unlinkDead(network, addr string) bool {
	info, err := os.Lstat(addr)
	if err != nil || info.Mode().Type() != fs.ModeSocket {
		return false
	}
	conn, err := net.Dial(network, addr)
	if err == nil {
		conn.Close()
		return false
	}
	return isRefused(err) && os.Remove(addr) == nil
}

// ListenWithCallback returns a listener inherited from the parent process, or
// calls callback to create a new one, which must implement Listener. Use it
// where Options.ListenConfig does not suffice.
//
// An error from callback is wrapped. The registry is not locked during the
// call, so that callback may use it. As for Listen, the caller owns the listener.
func (f *Fds) ListenWithCallback(network, addr string, callback func(network, addr string) (net.Listener, error)) (net.Listener, error) {
	return listen(f, network, addr, f.Listener, callback, func(ln net.Listener) error {
		shared, ok := ln.(Listener)
		if !ok {
			return fmt.Errorf("tableflip: listen on %s %s: %T does not implement tableflip.Listener", network, addr, ln)
		}
		return f.addListener(network, addr, shared, false)
	})
}

// Listener returns an inherited listener, or nil, nil if there is none of this
// name that has not been taken. The caller owns it.
func (f *Fds) Listener(network, addr string) (net.Listener, error) {
	return claim(f, name{kindListener, network, addr}, func(e *entry) (net.Listener, error) {
		ln, err := through(f, e, net.FileListener)
		if err != nil {
			return nil, err
		}
		e.unlinker, _ = ln.(unlinker)
		return withKeepAlive(ln, &f.listenConfig), nil
	})
}

// AddListener passes ln on to the next child under the given name. It takes the
// place of listeners that have this name. The caller keeps ln and may close it:
// a duplicate is passed on. If ln is a Unix listener, its Close no longer
// unlinks the socket file; Stop does.
func (f *Fds) AddListener(network, addr string, ln Listener) error {
	return f.addListener(network, addr, ln, true)
}

func (f *Fds) addListener(network, addr string, ln Listener, supersede bool) error {
	e := &entry{descriptor: &descriptor{name: name{kindListener, network, addr}}}
	return f.add(e, supersede, ln, func() {
		e.describe(ln.Addr())
		if e.path == "" {
			return
		}
		if u, ok := ln.(unlinker); ok {
			u.SetUnlinkOnClose(false)
			e.unlinker = u
		}
	})
}

// RemoveListener stops passing a listener on. It does not close the caller's. It
// gives a Unix listener back the duty to unlink its socket file when it is
// closed. Of several listeners with this name the one added first is removed; if
// there is none, the error is os.ErrNotExist.
//
// In a child whose Ready has not returned, an inherited listener counts as not
// taken again.
func (f *Fds) RemoveListener(network, addr string) error {
	return f.remove(name{kindListener, network, addr})
}

// ListenPacket returns a packet conn inherited from the parent process, or
// creates a new one with Options.ListenConfig. Parent and child both receive
// from the same queue until one of them closes its packet conn.
//
// The caller owns the packet conn. Stop unlinks a Unix socket's file. Where a process
// that was killed has left one, which nobody has open, it is replaced.
func (f *Fds) ListenPacket(network, addr string) (net.PacketConn, error) {
	return f.ListenPacketWithCallback(network, addr, func(network, addr string) (net.PacketConn, error) {
		return bind(f.listenConfig.ListenPacket, network, addr)
	})
}

// ListenPacketWithCallback returns a packet conn inherited from the parent
// process, or calls callback to create a new one, which must implement
// PacketConn. It is to ListenPacket what ListenWithCallback is to Listen.
func (f *Fds) ListenPacketWithCallback(network, addr string, callback func(network, addr string) (net.PacketConn, error)) (net.PacketConn, error) {
	return listen(f, network, addr, f.PacketConn, callback, func(conn net.PacketConn) error {
		shared, ok := conn.(PacketConn)
		if !ok {
			return fmt.Errorf("tableflip: listen on %s %s: %T does not implement tableflip.PacketConn", network, addr, conn)
		}
		created := &entry{descriptor: &descriptor{name: name{kindPacketConn, network, addr}}}
		created.describe(conn.LocalAddr())
		err := f.addPacketConn(network, addr, shared, false)
		if err != nil {
			// Its Close will not do it, other than a listener's.
			f.log(created.unlink())
		}
		return err
	})
}

// PacketConn returns an inherited packet conn, or nil, nil if there is none of
// this name that has not been taken. The caller owns it.
func (f *Fds) PacketConn(network, addr string) (net.PacketConn, error) {
	return claim(f, name{kindPacketConn, network, addr}, func(e *entry) (net.PacketConn, error) {
		return through(f, e, net.FilePacketConn)
	})
}

// AddPacketConn passes conn on to the next child under the given name. It takes
// the place of packet conns that have this name. The caller keeps conn and may
// close it: a duplicate is passed on.
func (f *Fds) AddPacketConn(network, addr string, conn PacketConn) error {
	return f.addPacketConn(network, addr, conn, true)
}

func (f *Fds) addPacketConn(network, addr string, conn PacketConn, supersede bool) error {
	e := &entry{descriptor: &descriptor{name: name{kindPacketConn, network, addr}}}
	return f.add(e, supersede, conn, func() { e.describe(conn.LocalAddr()) })
}

// RemovePacketConn stops passing a packet conn on. It does not close the
// caller's. From then on the file of a Unix socket is the caller's to unlink. Of
// several with this name the one added first is removed; if there is none, the
// error is os.ErrNotExist.
func (f *Fds) RemovePacketConn(network, addr string) error {
	return f.remove(name{kindPacketConn, network, addr})
}

// Conn returns an inherited connection, or nil, nil if there is none of this
// name that has not been taken.
//
// The caller owns it. It is passed on to the next child, unless it was closed:
// the registry holds no duplicate of it.
func (f *Fds) Conn(network, addr string) (net.Conn, error) {
	return claim(f, name{kindConn, network, addr}, func(e *entry) (net.Conn, error) {
		// Not through the lens, which would hold the connection open.
		file, err := e.duplicate()
		if err != nil {
			return nil, err
		}
		defer file.Close()
		conn, err := net.FileConn(file)
		if err != nil {
			return nil, err
		}
		shared, ok := conn.(Conn)
		if !ok {
			conn.Close()
			return nil, fmt.Errorf("%T does not implement tableflip.Conn", conn)
		}
		f.log(e.close())
		e.conn = shared
		return conn, nil
	})
}

// AddConn passes conn on to the next child under the given name. It takes the
// place of connections that have this name. The caller keeps conn and may close
// it: a duplicate is passed on, which keeps the connection open until RemoveConn,
// a successful upgrade, or Stop.
func (f *Fds) AddConn(network, addr string, conn Conn) error {
	return f.add(&entry{descriptor: &descriptor{name: name{kindConn, network, addr}}}, true, conn, nil)
}

// RemoveConn stops passing a connection on. It does not close the caller's. Of
// several with this name the one added first is removed; if there is none, the
// error is os.ErrNotExist.
func (f *Fds) RemoveConn(network, addr string) error {
	return f.remove(name{kindConn, network, addr})
}

// File returns an inherited file, or nil, nil if there is none of this name that
// has not been taken. The caller owns it; what is passed on is another duplicate
// of the same open file. Its Name is "fd:NAME:". It may be in blocking mode.
func (f *Fds) File(fileName string) (*os.File, error) {
	return claim(f, name{kindFile, fileName, ""}, (*entry).duplicate)
}

// Files returns all inherited files that have not been taken, in the order in
// which they were added. For each, it does what File does. On an error none is
// taken.
func (f *Fds) Files() ([]*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed != nil {
		return nil, f.closed
	}
	var files []*os.File
	var unclaimed []*entry
	for _, e := range f.entries {
		if e.used || e.kind != kindFile {
			continue
		}
		file, err := e.duplicate()
		if err != nil {
			for _, file := range files {
				file.Close()
			}
			return nil, fmt.Errorf("tableflip: can't open inherited %q: %w", e.name, err)
		}
		files = append(files, file)
		unclaimed = append(unclaimed, e)
	}
	for _, e := range unclaimed {
		e.used = true
	}
	return files, nil
}

// AddFile passes file on to the next child under the given name. It takes the
// place of files that have this name. The caller keeps file and may close it: a
// duplicate, which shares the file offset and locks by flock(2), is passed on. A
// process loses its locks by fcntl(2) when it closes any duplicate: do not hold
// these on a file that is passed on.
func (f *Fds) AddFile(fileName string, file *os.File) error {
	return f.add(&entry{descriptor: &descriptor{name: name{kindFile, fileName, ""}}}, true, file, nil)
}

// RemoveFile stops passing a file on. It does not close the caller's. If there
// is none with this name, the error is os.ErrNotExist.
func (f *Fds) RemoveFile(fileName string) error {
	return f.remove(name{kindFile, fileName, ""})
}

// listen is what all Listen methods do, for either kind of socket.
func listen[T interface {
	comparable
	Close() error
}](f *Fds, network, addr string, claim, create func(network, addr string) (T, error), add func(T) error) (T, error) {
	var none T
	// Not to take an address that the new process may want.
	f.mu.Lock()
	f.awaitThaw()
	err := f.closed
	f.mu.Unlock()
	if err != nil {
		return none, fmt.Errorf("tableflip: listen on %s %s: %w", network, addr, err)
	}

	socket, err := claim(network, addr)
	if err != nil || socket != none {
		return socket, err
	}
	if create == nil {
		return none, fmt.Errorf("tableflip: can't create new socket for %s %s: the callback is nil", network, addr)
	}
	// The lock is not held here: resolving a name may take long.
	socket, err = create(network, addr)
	if err != nil {
		return none, fmt.Errorf("tableflip: can't create new socket for %s %s: %w", network, addr, err)
	}
	if socket == none {
		return none, fmt.Errorf("tableflip: can't create new socket for %s %s: the callback returned nil", network, addr)
	}
	if err := add(socket); err != nil {
		socket.Close()
		return none, err
	}
	return socket, nil
}

// claim takes the inherited entry that was added first under n. Without one it
// returns the zero T.
func claim[T any](f *Fds, n name, open func(*entry) (T, error)) (T, error) {
	var want endpoint
	var isEndpoint bool
	if f.activated {
		want, isEndpoint = parseEndpoint(n) // may look a service's port up
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var none T
	if f.closed != nil {
		return none, f.closed
	}
	e := f.find(n, false)
	renamed := false
	if e == nil && isEndpoint {
		e = f.findActivated(n, want)
		renamed = true
	}
	if e == nil {
		return none, nil
	}
	opened, err := open(e)
	if err != nil {
		return none, fmt.Errorf("tableflip: can't open inherited %q: %w", e.name, err)
	}
	if renamed {
		f.rename(e, n)
	}
	e.used = true
	return opened, nil
}

// duplicate returns a file for callers, that they close, of an entry that is no
// claimed connection.
func (e *entry) duplicate() (*os.File, error) {
	var file *os.File
	err := e.control(func(fd uintptr) error {
		dup, err := duplicate(fd)
		if err == nil {
			file = os.NewFile(uintptr(dup), e.name.String())
		}
		return err
	})
	return file, err
}

// control calls use with e's descriptor.
func (e *entry) control(use func(fd uintptr) error) error {
	switch {
	case e.file != nil:
		return control(e.file, use)
	case e.conn != nil:
		return control(e.conn, use)
	default:
		return use(e.fd)
	}
}

// describe records what the kernel chose for e, and e's socket file if it has one.
func (e *entry) describe(addr net.Addr) {
	if addr == nil {
		return
	}
	if leavesOpen(e.network, e.addr) {
		e.given = addr.String()
	}
	bound, ok := addr.(*net.UnixAddr)
	if !ok || bound.Name == "" || strings.HasPrefix(bound.Name, "@") {
		return // an unbound or an abstract socket has no file, whatever its name
	}
	// The requested address is the second choice, for a socket that was bound
	// elsewhere and renamed into place.
	for _, path := range []string{bound.Name, e.addr} {
		info, err := os.Lstat(path)
		if err != nil || info.Mode().Type() != fs.ModeSocket {
			continue
		}
		if !strings.HasPrefix(path, "/") {
			dir, err := os.Getwd()
			if err != nil {
				continue
			}
			// Not filepath.Join: it would resolve ".." without following links.
			path = dir + "/" + path
		}
		e.path, e.socketFile = path, info
		return
	}
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

// add puts a duplicate of source into the registry, as e. If supersede is set,
// it closes the entries with e's name. Once nothing can fail any more, it calls
// describe to complete e.
func (f *Fds) add(e *entry, supersede bool, source syscall.Conn, describe func()) error {
	if source == nil {
		return fmt.Errorf("tableflip: add %q: it is nil", e.name)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.awaitThaw()
	if f.closed != nil {
		return fmt.Errorf("tableflip: add %q: %w", e.name, f.closed)
	}

	err := control(source, func(fd uintptr) error {
		var err error
		e.file, err = f.passiveFile(fd)
		return err
	})
	if err != nil {
		return fmt.Errorf("tableflip: add %q: %w", e.name, err)
	}
	if describe != nil {
		describe()
	}
	e.parents = !f.inCharge && slices.ContainsFunc(f.entries, func(other *entry) bool {
		return (other.inherited || other.parents) && other.path == e.path && other.hasFile()
	})
	same := slices.Clone(f.named(e.name).entries)
	e.used = true
	f.insert(e)
	for _, old := range same {
		if !supersede || !old.used || old.name != e.name || old.given != e.given {
			continue
		}
		if old.inherited && !f.inCharge && old.path != "" && old.path != e.path {
			f.unclaim(old) // takeCharge unlinks its file
			continue
		}
		f.log(f.drop(old))
	}
	f.keep(e)
	return nil
}

// drop stops passing e on, and gives its owner back what the registry took.
func (f *Fds) drop(e *entry) error {
	f.delete(e)
	f.unstore(e.fdName)
	// The listener unlinks by name, so that the file must be its own.
	if e.unlinker != nil && !e.parents && e.hasFile() && !f.pathInUse(e.path) {
		e.unlinker.SetUnlinkOnClose(true)
	}
	return e.close()
}

func (f *Fds) remove(n name) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.awaitThaw()
	if f.closed != nil {
		return fmt.Errorf("tableflip: remove %q: %w", n, f.closed)
	}
	e := f.find(n, true)
	if e == nil {
		return fmt.Errorf("tableflip: remove %q, which was not added: %w", n, os.ErrNotExist)
	}
	if e.inherited && !f.inCharge && e.conn == nil {
		// Its Unix socket file is still the parent's: takeCharge deals with it.
		f.unclaim(e)
		return nil
	}
	return f.drop(e)
}

// passOn freezes the registry and returns what the next child gets. The child's
// files must not be used after thaw, and release must be called once the child
// has been started, or has failed to.
func (f *Fds) passOn() (descriptors []*descriptor, files []*os.File, release func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	// The parent has exited, but who waits for that may not have run yet.
	f.openStoreLocked()
	var borrowed []*os.File
	release = func() {
		for _, file := range borrowed {
			file.Close()
		}
	}
	descriptors = make([]*descriptor, 0, len(f.entries))
	files = make([]*os.File, 0, len(f.entries))
	for _, e := range slices.Clone(f.entries) {
		file, err := f.fileOf(e)
		if e.conn != nil {
			if isNotOpen(err) {
				f.delete(e)
				continue
			}
			borrowed = append(borrowed, file)
		}
		if err != nil {
			release()
			return nil, nil, nil, fmt.Errorf("tableflip: pass on %q: %w", e.name, err)
		}
		d := e.descriptor
		if d.path != "" && !e.hasFile() {
			withoutPath := *d
			withoutPath.path = ""
			d = &withoutPath
		}
		descriptors = append(descriptors, d)
		files = append(files, file)
	}
	f.closeLens()
	f.frozen = make(chan struct{})
	return descriptors, files, release, nil
}

// fileOf returns e as a file. That of a claimed connection is the caller's.
func (f *Fds) fileOf(e *entry) (file *os.File, err error) {
	switch {
	case e.file != nil:
		return e.file, nil
	case e.conn != nil:
		err = control(e.conn, func(fd uintptr) error {
			file, err = f.passiveFile(fd)
			return err
		})
		return file, err
	default:
		e.file, err = f.makePassive(e.fd)
		return e.file, err
	}
}

// awaitThaw returns when no upgrade is under way, or right after one has succeeded.
// It unlocks f.mu while it waits.
func (f *Fds) awaitThaw() {
	for f.frozen != nil {
		thawed := f.frozen
		f.mu.Unlock()
		<-thawed
		f.mu.Lock()
	}
}

// thaw ends what passOn began.
func (f *Fds) thaw() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.thawLocked()
}

func (f *Fds) thawLocked() {
	if f.frozen != nil {
		close(f.frozen)
		f.frozen = nil
	}
}

// takeCharge closes and unlinks what was inherited and not claimed. From then on
// this process unlinks the sockets of all generations.
func (f *Fds) takeCharge() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.inCharge = true
	var unclaimed []*entry
	f.entries = slices.DeleteFunc(f.entries, func(e *entry) bool {
		e.parents = false
		if !e.used {
			unclaimed = append(unclaimed, e)
		}
		return !e.used
	})
	f.byName, f.claimed = nil, 0
	for _, e := range unclaimed {
		if f.logger != nil {
			f.logger.Warn("tableflip: closing an inherited descriptor that nobody claimed", "name", e.name.String())
		}
		if !f.pathInUse(e.path) {
			f.log(e.unlink())
		}
		f.unstore(e.fdName)
		f.log(e.close())
	}
}

// prepare opens what the next upgrade needs, and would take the time for.
func (f *Fds) prepare() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.entries {
		if e.conn == nil {
			_, err := f.fileOf(e)
			f.log(err)
		}
	}
	f.closeLens()
}

func (f *Fds) pathInUse(path string) bool {
	return path != "" && slices.ContainsFunc(f.entries, func(e *entry) bool { return e.path == path })
}

// handedOver closes all that the registry holds: it is the child's now.
func (f *Fds) handedOver() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log(f.close(ErrUpgraded, func(*entry) bool { return false }))
}

// stop closes all that the registry holds and unlinks the Unix sockets that this
// process created. If it is in charge, it unlinks those of all generations, and has
// the service manager close its copies.
func (f *Fds) stop(inCharge bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if inCharge {
		f.emptyStore()
	}
	f.log(f.close(ErrStopped, func(e *entry) bool { return inCharge || !e.inherited && !e.parents }))
}

// close closes all that the registry holds. From then on its methods return
// reason.
func (f *Fds) close(reason error, unlink func(*entry) bool) error {
	var errs []error
	for _, e := range f.entries {
		if unlink(e) {
			errs = append(errs, e.unlink())
		}
		if err := e.close(); err != nil {
			errs = append(errs, err)
		}
	}
	for _, file := range []*os.File{f.blocking, f.lens} {
		if file != nil {
			errs = append(errs, file.Close())
		}
	}
	f.entries, f.byName, f.blocking, f.lens = nil, nil, nil, nil
	f.closed = reason
	f.thawLocked()
	return errors.Join(errs...)
}

func (f *Fds) log(err error) {
	if err != nil && f.logger != nil {
		f.logger.Warn("tableflip: cleaning up", "error", err)
	}
}

// passiveFile returns a file for a duplicate of fd that the runtime's poller
// does not watch.
//
// os.NewFile has the poller watch a descriptor in non-blocking mode, and two
// descriptors of one socket in the poller wake the process twice for whatever
// arrives. So it is shown a blocking descriptor, which then gets to refer to
// the socket.
func (f *Fds) passiveFile(fd uintptr) (*os.File, error) {
	if f.blocking == nil {
		var err error
		if f.blocking, err = openBlocking(); err != nil {
			return nil, err
		}
	}
	var placeholder int
	err := control(f.blocking, func(fd uintptr) error {
		var err error
		placeholder, err = duplicate(fd)
		return err
	})
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(placeholder), "")
	if err := replace(uintptr(placeholder), fd); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// makePassive returns what passiveFile does for fd itself. As it keeps its number,
// it is where the next child gets it, and the next exec need not move it.
func (f *Fds) makePassive(fd uintptr) (*os.File, error) {
	if err := f.pointLens(fd); err != nil {
		return nil, err
	}
	if err := control(f.blocking, func(blocking uintptr) error { return replace(fd, blocking) }); err != nil {
		return nil, err
	}
	file := os.NewFile(fd, "")
	if err := control(f.lens, func(lens uintptr) error { return replace(fd, lens) }); err != nil {
		return nil, err
	}
	return file, nil
}

// openBlocking returns a file in blocking mode that needs no file system.
func openBlocking() (*os.File, error) {
	file, other, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	other.Close()
	if err := control(file, func(fd uintptr) error { return setNonblock(fd, false) }); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// through opens an inherited entry. One file, the lens, is made to refer to one
// descriptor after the other, which saves creating a file for each while clients
// wait. It holds the last one open.
func through[T any](f *Fds, e *entry, open func(*os.File) (T, error)) (T, error) {
	if err := f.pointLens(e.fd); err != nil {
		var none T
		return none, err
	}
	return open(f.lens)
}

func (f *Fds) closeLens() {
	if f.lens != nil {
		f.log(f.lens.Close())
		f.lens = nil
	}
}

func (f *Fds) pointLens(fd uintptr) (err error) {
	if f.lens == nil {
		f.lens, err = f.passiveFile(fd)
		return err
	}
	return control(f.lens, func(lens uintptr) error { return replace(lens, fd) })
}

// control calls use with c's descriptor, which stays open meanwhile. Unlike
// os.File.Fd, it leaves the blocking mode alone.
func control(c syscall.Conn, use func(fd uintptr) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var useErr error
	if err := raw.Control(func(fd uintptr) { useErr = use(fd) }); err != nil {
		// For a closed file it is an error that package os does not export.
		if file, ok := c.(*os.File); ok {
			if _, statErr := file.Stat(); errors.Is(statErr, os.ErrClosed) {
				return os.ErrClosed
			}
		}
		return err
	}
	return useErr
}

// withKeepAlive makes an inherited TCP listener give its connections the
// keep-alive parameters of config, as a listener that config created does:
// net.FileListener knows nothing of them.
func withKeepAlive(ln net.Listener, config *net.ListenConfig) net.Listener {
	tcp, ok := ln.(*net.TCPListener)
	if !ok || config.KeepAlive == 0 && !config.KeepAliveConfig.Enable {
		return ln
	}
	return &keepAliveListener{tcp, config.KeepAlive, config.KeepAliveConfig}
}

type keepAliveListener struct {
	*net.TCPListener
	idle   time.Duration
	config net.KeepAliveConfig
}

func (ln *keepAliveListener) Accept() (net.Conn, error) {
	conn, err := ln.AcceptTCP()
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// AcceptTCP applies the parameters as net.ListenConfig documents them. Like net,
// it ignores errors: they mean that the connection is gone.
func (ln *keepAliveListener) AcceptTCP() (*net.TCPConn, error) {
	conn, err := ln.TCPListener.AcceptTCP()
	if err != nil {
		return nil, err
	}
	switch {
	case ln.config.Enable:
		conn.SetKeepAliveConfig(ln.config)
	case ln.idle < 0:
		conn.SetKeepAlive(false)
	default:
		conn.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: ln.idle})
	}
	return conn, nil
}
