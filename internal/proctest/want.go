//go:build unix

package proctest

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/tableflip/internal/step"
)

// OK ends the test unless err is nil.
func OK(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// WantError checks that want is err, or among its causes.
func WantError(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

// Within waits for an event in this process.
func Within[T any](t testing.TB, what string, event <-chan T) T {
	t.Helper()
	select {
	case value := <-event:
		return value
	case <-time.After(Patience):
		t.Fatalf("waited in vain for %s", what)
		panic("unreachable")
	}
}

// AwaitThat waits until holds returns true. It polls, and is for what no event announces.
func AwaitThat(t testing.TB, what string, holds func() bool) {
	t.Helper()
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	timeout := time.After(Patience)
	for !holds() {
		select {
		case <-poll.C:
		case <-timeout:
			t.Fatalf("waited in vain for this: %s", what)
		}
	}
}

// InBackground returns the result of call once it has it.
func InBackground[T any](call func() T) <-chan T {
	result := make(chan T, 1)
	go func() { result <- call() }()
	return result
}

// Waited returns a channel that receives once all are done. It is for Within.
func Waited(all *sync.WaitGroup) <-chan bool {
	return InBackground(func() bool { all.Wait(); return true })
}

// Set gives a variable a value until the test ends.
func Set[T any](t testing.TB, variable *T, value T) {
	before := *variable
	*variable = value
	t.Cleanup(func() { *variable = before })
}

// IsClosed reports whether c is closed, or holds a value.
func IsClosed[T any](c <-chan T) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// When has this process call hook when it comes to a step of a handover.
func When(at step.Step, hook func()) (restore func()) {
	before := step.SetHook(nil)
	step.SetHook(func(reached step.Step) {
		if before != nil {
			before(reached)
		}
		if reached == at {
			hook()
		}
	})
	return func() { step.SetHook(before) }
}

// During does what When does until the end of the test, or until restore is called. No
// upgrade may be under way then. The test fails if the hook was never called.
func During(t *testing.T, at step.Step, hook func()) (restore func()) {
	t.Helper()
	var called atomic.Bool
	remove := When(at, func() {
		called.Store(true)
		hook()
	})
	restore = sync.OnceFunc(func() {
		remove()
		if !called.Load() && !t.Failed() && !t.Skipped() {
			t.Errorf("this process has not come to the step %q", at)
		}
	})
	t.Cleanup(restore)
	return restore
}
