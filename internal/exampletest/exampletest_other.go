//go:build unix && !linux && !aix

package exampletest

// becomeReaper does nothing: the init process reaps, and keeps the exit status.
func becomeReaper() error { return nil }
