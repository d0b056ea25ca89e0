//go:build unix && !linux

package proctest

import "testing"

// AwaitDeath does nothing: the end of the process's wire must do.
func AwaitDeath(*testing.T, int) {}

// AwaitStop does nothing: a request that is meant to meet nobody may meet somebody.
func AwaitStop(*testing.T, int) {}

// AdoptOrphans does nothing: the init process reaps, and keeps the exit status.
func AdoptOrphans() error { return nil }
