package exampletest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// becomeReaper makes this process the parent of its descendants whose own parent
// has ended, as all generations of a service but the first come to be. Otherwise
// their exit status would go to the init process, which in containers often does
// not ask for it, so that they would not seem to end. See prctl(2).
func becomeReaper() error {
	err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("adopt orphans: %w", os.NewSyscallError("prctl", err))
	}
	return nil
}
