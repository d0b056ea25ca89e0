//go:build !linux

package process

// IsStaleMount reports whether path is a mount that shows a file that was replaced. Only
// Linux mounts single files.
func IsStaleMount(string) bool { return false }
