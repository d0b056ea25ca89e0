//go:build !linux

package process

// IsStaleMount returns false: only Linux mounts single files.
func IsStaleMount(string) bool { return false }
