// Package registry owns the duplicates of descriptors that a process holds for its
// children: from the moment that a descriptor is inherited or added to the moment that it
// is passed on. It also decides who unlinks a Unix socket's file. It knows nothing of
// processes.
package registry

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
)

// A Listener, a PacketConn or a Conn can be passed to another process.
type (
	Listener interface {
		net.Listener
		syscall.Conn
	}
	PacketConn interface {
		net.PacketConn
		syscall.Conn
	}
	Conn interface {
		net.Conn
		syscall.Conn
	}
)

// Options are the options of New.
type Options struct {
	ListenConfig net.ListenConfig
	Store        Store        // nil for none
	Logger       *slog.Logger // nil for none
}

// A Registry holds the descriptors that a process inherited, and those that it will
// pass on to its child. Its methods are safe for concurrent use. Those that log do so
// last, with nothing locked, because a Logger may call into the registry.
type Registry struct {
	listenConfig net.ListenConfig
	logger       *slog.Logger
	hasInherited bool // anything, at the start

	mu       sync.Mutex
	index    index
	expired  index // what was inherited, and is closed because nobody claimed it
	files    socketFiles
	store    storeState
	scratch  descriptor.Scratch // for claims
	frozen   chan struct{}      // non-nil during an upgrade, closed at its end
	closed   error              // why there will be no child
	warnings []warning          // what unlock is to log
}

// A warning is a record for the logger.
type warning struct {
	message string
	args    []any
}

// New returns a registry of inherited descriptors, which are open from first on. It
// owns them unless it returns an error.
func New(opts Options, first uintptr, inherited []*nametable.Entry) (*Registry, error) {
	r := &Registry{
		listenConfig: opts.ListenConfig,
		logger:       opts.Logger,
		hasInherited: len(inherited) > 0,
		store:        storeState{Store: opts.Store},
	}
	current.Store(r)
	r.mu.Lock()
	defer r.unlock()
	if closed, err := descriptor.SetCloseOnExec(first, len(inherited)); err != nil {
		return nil, fmt.Errorf("tableflip: inherit descriptor %d, %q: %w", closed, inherited[closed-first].Name, err)
	}
	entries := make([]entry, len(inherited))
	for i, table := range inherited {
		e := &entries[i]
		*e = entry{Entry: table, fd: first + uintptr(i), inherited: true}
		e.file = r.files.inherit(e.Path, e.FileID)
		r.warnIfLost(e)
		r.index.insert(e)
	}
	return r, nil
}

// DescribeStored completes the entries that come from the store, which keeps only their
// names.
func (r *Registry) DescribeStored() error {
	return r.describe(func(e *entry) bool { return nametable.IsStoreName(e.FDName) })
}

// DescribeAll completes entries that come from a parent that tells only their names.
func (r *Registry) DescribeAll() error {
	return r.describe((*entry).isAddressed)
}

func (r *Registry) describe(which func(*entry) bool) error {
	r.mu.Lock()
	defer r.unlock()
	for _, e := range r.index.entries {
		if !which(e) {
			continue
		}
		s, err := e.socket()
		if err != nil {
			return fmt.Errorf("tableflip: inherit descriptor %d, %q: %w", e.fd, e.Name, err)
		}
		e.setBoundAddr(s)
		e.file = r.files.restore(s.Path, e.Addr)
		r.warnIfLost(e)
	}
	return nil
}

func (r *Registry) warnIfLost(e *entry) {
	if e.isLost() {
		r.warn("tableflip: the file of an inherited Unix socket is gone, and nobody can reach it any more: it is not claimed, so that Listen binds a new one",
			"name", e.Name.String(), "path", e.file.path)
	}
}

// unlock ends what r.mu.Lock began, and logs what has happened in between.
func (r *Registry) unlock() {
	warnings := r.warnings
	r.warnings = nil
	r.mu.Unlock()
	for _, w := range warnings {
		r.logger.Warn(w.message, w.args...)
	}
}

// warn must be called with r.mu locked.
func (r *Registry) warn(message string, args ...any) {
	if r.logger != nil {
		r.warnings = append(r.warnings, warning{message, args})
	}
}

// log must be called with r.mu locked.
func (r *Registry) log(err error) {
	if err != nil {
		r.warn("tableflip: cleaning up", "error", err)
	}
}

// claim returns what open makes of the inherited entry that was added first under n
// or, if there is none, of the first one that is bound to what n asks for. If there is
// no such entry, it returns the zero T.
func claim[T any](r *Registry, n nametable.Name, open func(*entry) (T, error)) (T, error) {
	r.mu.Lock()
	defer r.unlock()
	var none T
	if r.closed != nil {
		return none, r.closed
	}
	e := r.index.find(n, false)
	if e == nil && r.hasInherited {
		var err error
		if e, err = r.findByAddrLocked(n); err != nil {
			return none, err
		}
	}
	if e == nil {
		return none, nil
	}

	opened, err := open(e)
	if err != nil {
		return none, fmt.Errorf("tableflip: can't open inherited %q: %w", e.Name, err)
	}
	if e.Name != n && !slices.Contains(e.names(), n) {
		r.index.rename(e, n) // the next child asks for it by this name
	}
	e.claimed = true
	return opened, nil
}

// findByAddrLocked finds an entry by the address that n asks for. It returns an error
// for an entry that was closed because nobody had claimed it before Ready. It unlocks
// r.mu for a while.
func (r *Registry) findByAddrLocked(n nametable.Name) (*entry, error) {
	r.mu.Unlock()
	want, isAddr := parseListenAddr(n) // may look a service's port up, and read links
	r.mu.Lock()
	if r.closed != nil {
		return nil, r.closed
	}

	e, late := r.index.find(n, false), r.expired.find(n, false)
	if isAddr && e == nil {
		e = r.index.findByAddr(n.Kind, want)
	}
	if isAddr && e == nil && late == nil {
		late = r.expired.findByAddr(n.Kind, want)
	}
	if e == nil && late != nil {
		return nil, fmt.Errorf("tableflip: %q was inherited, was not claimed before Ready, and is closed: claim it before Ready%s", late.Name, late.boundHint())
	}
	return e, nil
}

// add puts a duplicate of source into the registry, as e. If supersede is set, it
// closes the entries with e's name.
func (r *Registry) add(e *entry, supersede bool, source syscall.Conn) error {
	if source == nil {
		return fmt.Errorf("tableflip: add %q: it is nil", e.Name)
	}
	var err error
	if e.fd, err = descriptor.DuplicateOf(source); err != nil {
		return fmt.Errorf("tableflip: add %q: %w", e.Name, err)
	}
	err = e.describe(source)
	if err == nil {
		err = r.insert(e, supersede, source)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("tableflip: add %q: %w", e.Name, err), e.close())
	}
	if e.isAddressed() {
		r.flushStore()
	}
	return nil
}

func (r *Registry) insert(e *entry, supersede bool, source syscall.Conn) error {
	r.mu.Lock()
	defer r.unlock()
	r.waitUnfrozenLocked()
	if r.closed != nil {
		return r.closed
	}

	if e.isAddressed() {
		if e.file = r.files.find(e.bound.Path, e.Addr); e.file != nil {
			e.setOwner(source)
		}
	}
	e.claimed = true
	r.warnIfAtRisk(e)
	var superseded []*entry
	if supersede {
		superseded = r.supersededBy(e)
	}
	r.index.insert(e)

	for _, old := range superseded {
		if old.inherited && !r.files.inCharge && old.file != e.file {
			r.index.unclaim(old) // TakeCharge unlinks its file
			continue
		}
		r.log(r.drop(old))
	}
	r.keep(e)
	return nil
}

// warnIfAtRisk is for a socket that shares its address with inherited ones
// (SO_REUSEPORT). The kernel gives it a part of the connections even before Ready, and
// they are lost if the upgrade fails.
func (r *Registry) warnIfAtRisk(e *entry) {
	if !r.hasInherited || r.files.inCharge || !e.isAddressed() || isUnix(e.bound.Network) {
		return
	}
	beside := func(old *entry) bool {
		return !old.byManager() && old.bound.Network == e.bound.Network && old.bound.Bound == e.bound.Bound
	}
	if slices.ContainsFunc(r.index.boundTo(keyOf(e, *e.bound)), beside) {
		r.warn("tableflip: a new socket shares the address of an inherited one: what the kernel gives it until Ready returns is lost if this upgrade fails", "name", e.Name.String())
	}
}

// supersededBy returns the entries that e replaces.
func (r *Registry) supersededBy(e *entry) []*entry {
	var superseded []*entry
	for _, old := range r.index.named(e.Name) {
		if old.claimed && old.Name == e.Name {
			superseded = append(superseded, old)
		}
	}
	return superseded
}

// drop stops passing e on, and gives its owner back the duty to unlink its file.
func (r *Registry) drop(e *entry) error {
	r.index.delete(e)
	r.unstore(e.FDName)
	var err error
	if r.files.release(e.file) {
		err = leaveFile(e.file, e.owner)
	}
	return errors.Join(err, e.close())
}

func (r *Registry) remove(n nametable.Name) error {
	err := r.removeNamed(n)
	if err == nil && (n.Kind == nametable.Listener || n.Kind == nametable.PacketConn) {
		r.flushStore()
	}
	return err
}

func (r *Registry) removeNamed(n nametable.Name) error {
	r.mu.Lock()
	defer r.unlock()
	r.waitUnfrozenLocked()
	if r.closed != nil {
		return fmt.Errorf("tableflip: remove %q: %w", n, r.closed)
	}
	e := r.index.find(n, true)
	if e == nil {
		return fmt.Errorf("tableflip: remove %q, which was not added: %w", n, os.ErrNotExist)
	}
	if e.inherited && !r.files.inCharge && e.conn == nil {
		// Its Unix socket file is still the parent's: TakeCharge deals with it.
		r.index.unclaim(e)
		return nil
	}
	return r.drop(e)
}

// FreezeForChild freezes the registry and returns what the next child gets. It blocks
// while OpenStore does. The caller must call release once the child has been started, or
// has failed to, and then Unfreeze, HandOver or Stop.
func (r *Registry) FreezeForChild() (entries []*nametable.Entry, fds []uintptr, release func(), err error) {
	// The parent has exited, but the goroutine that opens the store then may not have run
	// yet. And the child must not be told of copies that there are not.
	r.OpenStore()

	r.mu.Lock()
	defer r.unlock()
	entries = make([]*nametable.Entry, 0, len(r.index.entries))
	fds = make([]uintptr, 0, len(r.index.entries))
	var borrowed []uintptr
	release = func() {
		for _, fd := range borrowed {
			_ = descriptor.Close(fd)
		}
	}
	var closed []*entry
	for _, e := range r.index.entries {
		fd := e.fd
		if e.conn != nil {
			// Its caller may close it at any time.
			fd, err = descriptor.DuplicateOf(e.conn)
			if descriptor.IsClosed(err) {
				closed = append(closed, e)
				continue
			}
			if err != nil {
				release()
				return nil, nil, nil, fmt.Errorf("tableflip: pass on %q: %w", e.Name, err)
			}
			borrowed = append(borrowed, fd)
		}
		entries = append(entries, e.forChild())
		fds = append(fds, fd)
	}
	for _, e := range closed {
		r.index.delete(e)
	}
	r.frozen = make(chan struct{})
	return entries, fds, release, nil
}

// Unfreeze ends what FreezeForChild began.
func (r *Registry) Unfreeze() {
	r.mu.Lock()
	defer r.unlock()
	r.unfreezeLocked()
}

func (r *Registry) unfreezeLocked() {
	if r.frozen != nil {
		close(r.frozen)
		r.frozen = nil
	}
}

// waitUnfrozenLocked returns when no upgrade is under way, or right after one has
// succeeded. It unlocks r.mu while it waits.
func (r *Registry) waitUnfrozenLocked() {
	for r.frozen != nil {
		unfrozen := r.frozen
		r.mu.Unlock()
		<-unfrozen
		r.mu.Lock()
	}
}

// TakeCharge does what can't be undone once this process is in charge: it closes and
// unlinks inherited descriptors that nobody claimed, and has the Unix listeners show this
// process's credentials. From then on this process unlinks the sockets of all
// generations.
func (r *Registry) TakeCharge() {
	r.mu.Lock()
	defer r.unlock()
	r.files.inCharge = true
	r.log(r.scratch.Close())

	var stored []string
	for _, e := range r.index.takeUnclaimed() {
		r.warn("tableflip: closing an inherited descriptor that nobody claimed", "name", e.Name.String())
		if e.isAddressed() {
			_, _ = e.socket() // so that a later claim finds it by its address
		}
		if r.files.release(e.file) {
			r.log(e.file.unlink())
		}
		stored = append(stored, e.FDName)
		r.log(e.close())
		r.expired.insert(e)
	}
	r.unstore(stored...)

	for _, e := range r.index.entries {
		r.log(e.refresh())
	}
}

// ForgetUnclaimed is called once the parent has exited. Until then the parent may serve
// the sockets that this process did not claim, and a claim of one is an error. From then
// on a new socket can be bound in its place.
func (r *Registry) ForgetUnclaimed() {
	r.mu.Lock()
	defer r.unlock()
	r.expired = index{}
}

// HandOver closes all that the registry holds: it is the child's now. From then on
// its methods fail with reason.
func (r *Registry) HandOver(reason error) {
	r.mu.Lock()
	defer r.unlock()
	r.closeAll(reason, false)
}

// Stop closes all that the registry holds and unlinks the Unix sockets that this
// process created. If the process is in charge, Stop unlinks those of all
// generations, and empties the Store, for which it blocks as long as the Store's
// Flush. From then on the registry's methods fail with reason.
func (r *Registry) Stop(inCharge bool, reason error) {
	r.mu.Lock()
	r.files.inCharge = inCharge
	if inCharge {
		r.emptyStore()
	}
	r.closeAll(reason, true)
	r.unlock()
	r.flushStore()
}

func (r *Registry) closeAll(reason error, unlink bool) {
	var fds []uintptr
	for _, e := range r.index.clear() {
		if r.files.release(e.file) && unlink {
			r.log(e.file.unlink())
		}
		if e.conn == nil {
			fds = append(fds, e.fd)
		}
	}
	r.log(descriptor.CloseAll(fds))
	r.log(r.scratch.Close())
	r.expired = index{}
	r.closed = reason
	r.unfreezeLocked()
}
