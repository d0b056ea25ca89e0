package registry

import (
	"cmp"
	"slices"

	"example.com/tableflip/internal/nametable"
)

// An index holds entries in the order in which they were added. It finds them by name,
// and inherited ones also by the address that they are bound to. Its zero value is empty.
type index struct {
	entries []*entry
	added   int                         // how many entries were ever inserted
	next    int                         // all entries before it are claimed
	buckets map[nametable.Name][]*entry // by name, nil until find needs it
	byAddr  map[addrKey][]*entry        // the inherited ones, nil until it is needed
}

func (x *index) insert(e *entry) {
	x.added++
	e.order = x.added
	x.entries = append(x.entries, e)
	if x.buckets != nil {
		x.addToBuckets(e)
	}
}

// delete removes an entry that is claimed. The entry stays in byAddr, where only
// unclaimed ones are looked for.
func (x *index) delete(e *entry) {
	x.entries = slices.DeleteFunc(x.entries, func(other *entry) bool { return other == e })
	x.next = 0
	x.removeFromBuckets(e)
}

// find returns the first entry of this name that is claimed or, if claimed is false, that
// can be claimed, or nil. An entry that was added by the name comes before one that is
// bound to it.
func (x *index) find(n nametable.Name, claimed bool) *entry {
	if !claimed {
		// A new version mostly claims in the order in which the old one did.
		for x.next < len(x.entries) && x.entries[x.next].claimed {
			x.next++
		}
		if x.next < len(x.entries) && x.entries[x.next].Name == n && x.entries[x.next].isClaimable() {
			return x.entries[x.next]
		}
	}
	var other *entry // has this name besides its own
	for _, e := range x.named(n) {
		switch {
		case e.claimed != claimed || !claimed && e.isLost():
		case e.Name == n:
			return e
		case other == nil:
			other = e
		}
	}
	return other
}

// findByAddr returns the first entry that can be claimed and is what want asks for.
func (x *index) findByAddr(kind string, want listenAddr) *entry {
	bucket := x.boundTo(want.addrKey)
	for _, exactly := range []bool{true, false} {
		for _, e := range bucket {
			if e.Kind == kind && e.isClaimable() && want.matches(*e.bound, exactly) {
				return e
			}
		}
	}
	return nil
}

// boundTo returns the inherited entries of this key. It asks the kernel only once about
// each.
func (x *index) boundTo(key addrKey) []*entry {
	if x.byAddr == nil {
		x.byAddr = make(map[addrKey][]*entry)
		for _, e := range x.entries {
			if !e.inherited || !e.isAddressed() {
				continue
			}
			if s, err := e.socket(); err == nil {
				key := keyOf(e, s)
				x.byAddr[key] = append(x.byAddr[key], e)
			}
		}
	}
	return x.byAddr[key]
}

// inTheWayOf returns the entries that nobody has claimed, and that may keep a socket
// from being bound to want.
func (x *index) inTheWayOf(want listenAddr) (found []*entry) {
	for _, e := range x.entries {
		if e.claimed || !e.isAddressed() {
			continue
		}
		if s, err := e.socket(); err == nil && want.isInTheWay(keyOf(e, s)) {
			found = append(found, e)
		}
	}
	return found
}

// named returns all entries of this name.
func (x *index) named(n nametable.Name) []*entry {
	if x.buckets == nil {
		x.buckets = make(map[nametable.Name][]*entry, len(x.entries))
		for _, e := range x.entries {
			x.addToBuckets(e)
		}
	}
	return x.buckets[n]
}

func (x *index) addToBuckets(e *entry) {
	for _, n := range e.names() {
		bucket := x.buckets[n]
		at, _ := slices.BinarySearchFunc(bucket, e, func(a, b *entry) int { return cmp.Compare(a.order, b.order) })
		x.buckets[n] = slices.Insert(bucket, at, e)
	}
}

func (x *index) removeFromBuckets(e *entry) {
	if x.buckets == nil {
		return
	}
	for _, n := range e.names() {
		rest := slices.DeleteFunc(x.buckets[n], func(other *entry) bool { return other == e })
		if len(rest) == 0 {
			delete(x.buckets, n)
		} else {
			x.buckets[n] = rest
		}
	}
}

func (x *index) rename(e *entry, n nametable.Name) {
	x.removeFromBuckets(e)
	e.Entry = e.With(func(e *nametable.Entry) { e.Name = n })
	if x.buckets != nil {
		x.addToBuckets(e)
	}
}

func (x *index) unclaim(e *entry) {
	e.claimed = false
	x.next = 0
}

// takeUnclaimed deletes and returns the entries that are not claimed.
func (x *index) takeUnclaimed() []*entry {
	var unclaimed, claimed []*entry
	for _, e := range x.entries {
		if e.claimed {
			claimed = append(claimed, e)
		} else {
			unclaimed = append(unclaimed, e)
		}
	}
	*x = index{entries: claimed, added: x.added}
	return unclaimed
}

// clear deletes and returns all entries.
func (x *index) clear() []*entry {
	entries := x.entries
	*x = index{}
	return entries
}
