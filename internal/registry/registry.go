// Package registry owns the duplicates of descriptors that a process holds for its
// children, from the moment that one is inherited or added to the moment that it is
// passed on, and decides who unlinks a Unix socket's file. It knows nothing of
// processes.
package registry

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
)

// Listener, PacketConn and Conn can be shared between processes.
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
// pass on to its child. Its methods are safe for concurrent use.
type Registry struct {
	listenConfig net.ListenConfig
	logger       *slog.Logger
	byManager    bool // the service manager passed or stored inherited entries

	mu       sync.Mutex
	index    index
	files    socketFiles
	store    storeState
	scratch  descriptor.Scratch // for claims
	inCharge bool               // TakeCharge was called
	frozen   chan struct{}      // non-nil during an upgrade, closed at its end
	closed   error              // why there will be no child
}

// New returns a registry of inherited descriptors, which are open from first on. It
// owns them unless it returns an error.
func New(opts Options, first uintptr, inherited []*nametable.Entry) (*Registry, error) {
	r := &Registry{
		listenConfig: opts.ListenConfig,
		logger:       opts.Logger,
		store:        storeState{Store: opts.Store},
	}
	entries := make([]entry, len(inherited))
	for i, table := range inherited {
		e := &entries[i]
		*e = entry{Entry: table, fd: first + uintptr(i), inherited: true}
		if err := descriptor.SetCloseOnExec(e.fd); err != nil {
			return nil, fmt.Errorf("tableflip: inherit descriptor %d, %q: %w", e.fd, e.Name, err)
		}
		e.file = r.files.inherit(e.Path)
		r.byManager = r.byManager || e.FDName != ""
		r.index.insert(e)
	}
	return r, nil
}

// DescribeStored completes the entries that come from the store, which knows no more
// than their names.
func (r *Registry) DescribeStored() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.index.entries {
		if !nametable.IsStoreName(e.FDName) {
			continue
		}
		s, err := e.socket()
		if err != nil {
			return fmt.Errorf("tableflip: inherit descriptor %d, %q: %w", e.fd, e.Name, err)
		}
		e.describe(addrOf(s), &r.files)
		if e.file != nil {
			e.file.byParent = true
		}
	}
	return nil
}

// claim returns what open makes of the inherited entry that was added first under n,
// or the zero T if there is none.
func claim[T any](r *Registry, n nametable.Name, open func(*entry) (T, error)) (T, error) {
	var want listenAddr
	var isAddr bool
	if r.byManager {
		want, isAddr = parseListenAddr(n) // may look a service's port up
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	var none T
	if r.closed != nil {
		return none, r.closed
	}
	e := r.index.find(n, false)
	renamed := false
	if e == nil && isAddr {
		e = r.findByAddr(n, want)
		renamed = true
	}
	if e == nil {
		return none, nil
	}

	opened, err := open(e)
	if err != nil {
		return none, fmt.Errorf("tableflip: can't open inherited %q: %w", e.Name, err)
	}
	if renamed {
		r.index.rename(e, n) // the next child asks for it by this name
	}
	e.claimed = true
	return opened, nil
}

// findByAddr returns the first entry that the manager has passed, nobody has
// claimed, and want asks for.
func (r *Registry) findByAddr(n nametable.Name, want listenAddr) *entry {
	for _, exactly := range []bool{true, false} {
		for _, e := range r.index.entries {
			if e.claimed || e.FDName == "" || e.Kind != n.Kind {
				continue
			}
			if s, err := e.socket(); err == nil && want.matches(s, exactly) {
				return e
			}
		}
	}
	return nil
}

// add puts a duplicate of source into the registry, as e. If supersede is set,
// it closes the entries with e's name. Once nothing can fail any more, it calls
// describe to complete e.
func (r *Registry) add(e *entry, supersede bool, source syscall.Conn, describe func()) error {
	if source == nil {
		return fmt.Errorf("tableflip: add %q: it is nil", e.Name)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waitUnfrozenLocked()
	if r.closed != nil {
		return fmt.Errorf("tableflip: add %q: %w", e.Name, r.closed)
	}

	var err error
	if e.fd, err = descriptor.DuplicateOf(source); err != nil {
		return fmt.Errorf("tableflip: add %q: %w", e.Name, err)
	}
	if describe != nil {
		describe()
	}
	e.claimed = true
	var superseded []*entry
	if supersede {
		superseded = r.supersededBy(e)
	}
	r.index.insert(e)

	for _, old := range superseded {
		if old.inherited && !r.inCharge && old.Path != "" && old.Path != e.Path {
			r.index.unclaim(old) // TakeCharge unlinks its file
			continue
		}
		r.log(r.drop(old))
	}
	r.keep(e)
	return nil
}

// supersededBy returns the entries that e is to take the place of.
func (r *Registry) supersededBy(e *entry) []*entry {
	var superseded []*entry
	for _, old := range r.index.named(e.Name) {
		if old.claimed && old.Name == e.Name && old.BoundAddr == e.BoundAddr {
			superseded = append(superseded, old)
		}
	}
	return superseded
}

// drop stops passing e on, and gives its owner back what the registry took.
func (r *Registry) drop(e *entry) error {
	r.index.delete(e)
	r.unstore(e.FDName)
	if !r.pathInUse(e.Path) {
		// The listener unlinks by name, so that the file must be its own.
		if e.unlinker != nil && r.hasFile(e) && (r.inCharge || !e.file.byParent) {
			e.unlinker.SetUnlinkOnClose(true)
		}
		r.files.forget(e.Path)
	}
	return e.close()
}

func (r *Registry) remove(n nametable.Name) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waitUnfrozenLocked()
	if r.closed != nil {
		return fmt.Errorf("tableflip: remove %q: %w", n, r.closed)
	}
	e := r.index.find(n, true)
	if e == nil {
		return fmt.Errorf("tableflip: remove %q, which was not added: %w", n, os.ErrNotExist)
	}
	if e.inherited && !r.inCharge && e.conn == nil {
		// Its Unix socket file is still the parent's: TakeCharge deals with it.
		r.index.unclaim(e)
		return nil
	}
	return r.drop(e)
}

// FreezeForChild freezes the registry and returns what the next child gets. The
// caller must call release once the child has been started, or has failed to, and
// then Unfreeze, HandOver or Stop.
func (r *Registry) FreezeForChild() (entries []*nametable.Entry, files []*os.File, release func(), err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	// The parent has exited, but who waits for that may not have run yet.
	r.openStoreLocked()

	entries = make([]*nametable.Entry, 0, len(r.index.entries))
	files = make([]*os.File, 0, len(r.index.entries))
	var borrowed []*os.File
	release = func() {
		for _, file := range borrowed {
			file.Close()
		}
	}
	var closed []*entry
	for _, e := range r.index.entries {
		file, isBorrowed, err := e.fileForChild()
		if e.conn != nil && descriptor.IsClosed(err) {
			closed = append(closed, e)
			continue
		}
		if err != nil {
			release()
			return nil, nil, nil, fmt.Errorf("tableflip: pass on %q: %w", e.Name, err)
		}
		if isBorrowed {
			borrowed = append(borrowed, file)
		}
		table := e.Entry
		if table.Path != "" && !r.hasFile(e) {
			table = table.With(func(e *nametable.Entry) { e.Path = "" })
		}
		entries = append(entries, table)
		files = append(files, file)
	}
	for _, e := range closed {
		r.index.delete(e)
	}
	r.frozen = make(chan struct{})
	return entries, files, release, nil
}

// Unfreeze ends what FreezeForChild began.
func (r *Registry) Unfreeze() {
	r.mu.Lock()
	defer r.mu.Unlock()
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

// TakeCharge closes and unlinks what was inherited and not claimed. From then on
// this process unlinks the sockets of all generations.
func (r *Registry) TakeCharge() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inCharge = true
	r.log(r.scratch.Close())
	for _, e := range r.index.takeUnclaimed() {
		if r.logger != nil {
			r.logger.Warn("tableflip: closing an inherited descriptor that nobody claimed", "name", e.Name.String())
		}
		if !r.pathInUse(e.Path) {
			r.log(r.unlink(e))
		}
		r.unstore(e.FDName)
		r.log(e.close())
	}
}

// HandOver closes all that the registry holds: it is the child's now. From then on
// its methods fail with reason.
func (r *Registry) HandOver(reason error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log(r.closeAll(reason, func(*entry) bool { return false }))
}

// Stop closes all that the registry holds and unlinks the Unix sockets that this
// process created. If the process is in charge, Stop unlinks those of all
// generations, and empties the Store. From then on the registry's methods fail with
// reason.
func (r *Registry) Stop(inCharge bool, reason error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if inCharge {
		r.emptyStore()
	}
	r.log(r.closeAll(reason, func(e *entry) bool { return inCharge || !e.file.byParent }))
}

func (r *Registry) closeAll(reason error, unlinks func(*entry) bool) error {
	var errs []error
	for _, e := range r.index.clear() {
		if e.file != nil && unlinks(e) {
			errs = append(errs, r.unlink(e))
		}
		errs = append(errs, e.close())
	}
	errs = append(errs, r.scratch.Close())
	r.closed = reason
	r.unfreezeLocked()
	return errors.Join(errs...)
}

func (r *Registry) log(err error) {
	if err != nil && r.logger != nil {
		r.logger.Warn("tableflip: cleaning up", "error", err)
	}
}
