//go:build unix && !linux && !darwin && !dragonfly && !freebsd && !openbsd

package process

// isNoexec cannot tell here: the advice is to make the binary executable.
func isNoexec(string) bool { return false }
