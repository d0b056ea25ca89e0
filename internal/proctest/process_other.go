//go:build unix && !linux

package proctest

import "testing"

// AwaitDeath does nothing: the end of the process's wire must suffice.
func AwaitDeath(*testing.T, int) {}

// AwaitStop does nothing: the process may not have stopped yet.
func AwaitStop(*testing.T, int) {}

// AdoptOrphans does nothing: the init process reaps, and keeps the exit status.
func AdoptOrphans() error { return nil }
