//go:build !unix

package httpdrain

// isReadable cannot tell on this platform.
func isReadable(any) (readable, known bool) { return false, false }
