package registry

import (
	"slices"

	"example.com/tableflip/internal/nametable"
)

// A Store keeps copies of the registry's sockets outside of this process. It is
// called with the registry locked.
type Store interface {
	// Keep is offered an entry, and returns what the copy of its descriptor is
	// called, or an empty string if there is none.
	Keep(e *nametable.Entry, fd uintptr) (fdName string)

	// Remove removes all copies of this name.
	Remove(fdName string)
}

// storeState is what the registry knows of its Store.
type storeState struct {
	Store
	open    bool     // the store listens to this process by now
	removed []string // what to remove once it does
}

// OpenStore brings the copies in the Store in line with the registry, and keeps them
// so from then on. It must not be called before the Store listens to this process.
func (r *Registry) OpenStore() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.openStoreLocked()
}

func (r *Registry) openStoreLocked() {
	if r.store.Store == nil || r.store.open || r.closed != nil {
		return
	}
	r.store.open = true
	removed := r.store.removed
	r.store.removed = nil
	slices.Sort(removed)
	for _, fdName := range slices.Compact(removed) {
		r.unstore(fdName)
	}
	for _, e := range r.index.entries {
		r.keep(e)
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

// unstore has the store remove its copies of this name, except of entries that
// still are in the registry.
func (r *Registry) unstore(fdName string) {
	if r.store.Store == nil || !nametable.IsStoreName(fdName) {
		return
	}
	if !r.store.open {
		r.store.removed = append(r.store.removed, fdName)
		return
	}
	r.store.Remove(fdName)
	for _, e := range r.index.entries {
		if e.FDName == fdName {
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
		if nametable.IsStoreName(e.FDName) {
			names = append(names, e.FDName)
		}
	}
	slices.Sort(names)
	for _, fdName := range slices.Compact(names) {
		r.store.Remove(fdName)
	}
}
