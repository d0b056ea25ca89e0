// Package queue is what the Upgrader of this process and package service tell each other
// about upgrades that have to wait: package service keeps them, and the Upgrader talks to
// the service manager and to other generations. It is no part of the root's API, because
// whoever calls Upgrade has the error at once, and can wait by WaitForParent.
package queue

import (
	"context"
	"sync"
)

var (
	mu        sync.Mutex
	keep      func()
	asked     = make(chan struct{}, 1)
	isAwaited bool
)

type keptKey struct{}

// Keeping returns a context for an UpgradeContext whose caller keeps the upgrade if that
// returns ErrParentRunning, and tries it again later. The service manager is then told
// that the upgrade is queued, not that it has failed.
func Keeping(ctx context.Context) context.Context { return context.WithValue(ctx, keptKey{}, true) }

// IsKept reports whether a context is, or comes from, one of Keeping.
func IsKept(ctx context.Context) bool { return ctx.Value(keptKey{}) != nil }

// OnKeep has Keep call f from now on.
func OnKeep(f func()) {
	mu.Lock()
	defer mu.Unlock()
	keep = f
}

// Keep is called by whoever was asked for an upgrade that has to wait. A service manager
// that waits for the answer to a reload is told that the upgrade is queued, or will be told
// how the one under way has ended. If this process has been replaced, its successor is
// asked. Keep blocks for a second at most, if the manager does not read.
func Keep() {
	mu.Lock()
	f := keep
	mu.Unlock()
	if f != nil {
		f()
	}
}

// Asked returns a channel that receives when the process that this one has replaced
// passes an upgrade on. It holds one, however many there were.
func Asked() <-chan struct{} {
	mu.Lock()
	defer mu.Unlock()
	isAwaited = true
	return asked
}

// Ask has the channel of Asked receive. It reports whether anybody has called Asked.
func Ask() bool {
	mu.Lock()
	defer mu.Unlock()
	if isAwaited {
		select {
		case asked <- struct{}{}:
		default:
		}
	}
	return isAwaited
}
