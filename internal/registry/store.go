package registry

import (
	"slices"

	"example.com/tableflip/internal/nametable"
)

// A Store keeps copies of the registry's sockets outside of this process. Keep and
// Remove are called with the registry locked: they must not block or log, and take effect
// in the order of their calls.
type Store interface {
	// Keep returns the name that the copy of the entry's descriptor will have, or an
	// empty string if there will be none.
	Keep(e *nametable.Entry, fd uintptr) (fdName string)

	// Remove removes all copies of this name.
	Remove(fdName string)

	// Flush blocks until all calls before it have taken effect or failed, or for a
	// bounded time. It returns the names of copies that could not be made since the last
	// call.
	Flush() (failed []string)
}

// storeState is what the registry knows of its Store.
type storeState struct {
	Store
	open    bool     // the store listens to this process by now
	removed []string // names to remove once it does
}

// OpenStore brings the copies in the Store in line with the registry, and keeps them
// so from then on. It must not be called before the Store listens to this process. It
// blocks as long as the Store's Flush.
func (r *Registry) OpenStore() {
	r.mu.Lock()
	if r.store.Store != nil && !r.store.open && r.closed == nil {
		r.store.open = true
		r.unstore(r.store.removed...)
		r.store.removed = nil
		for _, e := range r.index.entries {
			r.keep(e)
		}
	}
	r.unlock()
	r.flushStore()
}

// flushStore blocks as long as the Store's Flush, so that no other message of this process
// to the manager, and no crash, overtakes the Store's. It must be called without the lock.
func (r *Registry) flushStore() {
	if r.store.Store == nil {
		return
	}
	failed := r.store.Flush()
	if len(failed) == 0 {
		return
	}
	r.mu.Lock()
	defer r.unlock()
	for _, e := range r.index.entries {
		if slices.Contains(failed, e.FDName) {
			e.setFDName("")
		}
	}
}

// keep has the store keep a copy of e.
func (r *Registry) keep(e *entry) {
	if !r.store.open {
		return
	}
	_ = e.control(func(fd uintptr) error {
		e.setFDName(r.store.Keep(e.Entry, fd))
		return nil
	})
}

// unstore has the store remove its copies of these names, except of entries that still
// are in the registry.
func (r *Registry) unstore(fdNames ...string) {
	if r.store.Store == nil {
		return
	}
	fdNames = storeNames(fdNames)
	if !r.store.open {
		r.store.removed = append(r.store.removed, fdNames...)
		return
	}
	if len(fdNames) == 0 {
		return
	}
	for _, fdName := range fdNames {
		r.store.Remove(fdName)
	}
	for _, e := range r.index.entries {
		if _, removed := slices.BinarySearch(fdNames, e.FDName); removed {
			e.setFDName("")
			r.keep(e)
		}
	}
}

// emptyStore has the store remove all copies, because nobody will ask for them.
func (r *Registry) emptyStore() {
	if r.store.Store == nil {
		return
	}
	names := r.store.removed
	for _, e := range r.index.entries {
		names = append(names, e.FDName)
	}
	for _, fdName := range storeNames(names) {
		r.store.Remove(fdName)
	}
}

// storeNames returns those of the names that are a store's, sorted, once each.
func storeNames(fdNames []string) []string {
	fdNames = slices.DeleteFunc(slices.Clone(fdNames), func(fdName string) bool { return !nametable.IsStoreName(fdName) })
	slices.Sort(fdNames)
	return slices.Compact(fdNames)
}
