//go:build unix

package proctest

import (
	"slices"
	"sync"
	"testing"
	"time"
)

// A Journal is a list that grows while other goroutines wait for its items. The zero value
// is empty.
type Journal[T any] struct {
	mu      sync.Mutex
	items   []T
	ended   bool
	changed chan struct{} // closed at the next change, nil if nobody waits
}

// Add adds an item at the end.
func (j *Journal[T]) Add(item T) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.items = append(j.items, item)
	j.changeLocked()
}

// End declares that no more items will be added.
func (j *Journal[T]) End() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ended = true
	j.changeLocked()
}

func (j *Journal[T]) changeLocked() {
	if j.changed != nil {
		close(j.changed)
		j.changed = nil
	}
}

// All returns the items that there are now.
func (j *Journal[T]) All() []T {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.items)
}

// HasEnded reports whether End was called.
func (j *Journal[T]) HasEnded() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.ended
}

// Await waits until done, which may change the items that it is given, returns true. If it
// has not by End, or within Patience, Await ends the test.
func (j *Journal[T]) Await(t testing.TB, what string, done func(items []T) bool) {
	t.Helper()
	came := false
	j.until(func() bool {
		came = done(j.items)
		return came || j.ended
	})
	if !came {
		t.Fatalf("waited in vain for %s", what)
	}
}

// AwaitEnd waits until End is called, and reports whether it was.
func (j *Journal[T]) AwaitEnd() bool { return j.until(func() bool { return j.ended }) }

// until waits until done, which is called with the lock held, returns true. After Patience
// it returns false.
func (j *Journal[T]) until(done func() bool) bool {
	timeout := time.After(Patience)
	for {
		j.mu.Lock()
		if done() {
			j.mu.Unlock()
			return true
		}
		if j.changed == nil {
			j.changed = make(chan struct{})
		}
		changed := j.changed
		j.mu.Unlock()
		select {
		case <-changed:
		case <-timeout:
			return false
		}
	}
}
