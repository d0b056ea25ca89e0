//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package supervise

// Run and Self say so, and nothing else here is ever reached.
const supported = false

func (Supervisor) run(string, bool) (int, error) { return 0, errNotSupported }
func isSupervised() bool                         { return false }
func adopt() error                               { return errNotSupported }
