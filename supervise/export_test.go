//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise

var (
	HurryTimeout = &hurryTimeout
	KillTimeout  = &killTimeout
	FlushTimeout = &flushTimeout
)
