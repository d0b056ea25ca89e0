package registry

import (
	"slices"

	"example.com/tableflip/internal/nametable"
)

// An index holds entries in the order in which they were added, and finds them by
// name. Its zero value is empty.
type index struct {
	entries []*entry
	next    int                         // all entries before it are claimed
	buckets map[nametable.Name][]*entry // by name, nil until find needs it
}

func (x *index) insert(e *entry) {
	x.entries = append(x.entries, e)
	if x.buckets != nil {
		x.addToBuckets(e)
	}
}

func (x *index) delete(e *entry) {
	isE := func(other *entry) bool { return other == e }
	x.entries = slices.DeleteFunc(x.entries, isE)
	x.next = 0
	if x.buckets == nil {
		return
	}
	for _, n := range e.names() {
		rest := slices.DeleteFunc(x.buckets[n], isE)
		if len(rest) == 0 {
			delete(x.buckets, n)
		} else {
			x.buckets[n] = rest
		}
	}
}

// find returns the first entry of this name that is claimed, or the first that is
// not, or nil.
func (x *index) find(n nametable.Name, claimed bool) *entry {
	if !claimed {
		// A new version mostly claims in the order in which the old one did.
		for x.next < len(x.entries) && x.entries[x.next].claimed {
			x.next++
		}
		if x.next < len(x.entries) && x.entries[x.next].Name == n {
			return x.entries[x.next]
		}
	}
	for _, e := range x.named(n) {
		if e.claimed == claimed {
			return e
		}
	}
	return nil
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
		x.buckets[n] = append(x.buckets[n], e)
	}
}

func (x *index) rename(e *entry, n nametable.Name) {
	e.Entry = e.With(func(e *nametable.Entry) { e.Name = n })
	x.buckets = nil
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
	*x = index{entries: claimed}
	return unclaimed
}

// clear deletes and returns all entries.
func (x *index) clear() []*entry {
	entries := x.entries
	*x = index{}
	return entries
}
