//go:build !linux

package process

import (
	"errors"
	"os"
	"time"
)

// A Handle refers to a process. There are none on this system.
type Handle struct{}

func Open(int) (*Handle, error) { return nil, errors.ErrUnsupported }

func OpenSelf() (uintptr, error) { return 0, errors.ErrUnsupported }

func Inherited(uintptr) (*Handle, error) { return nil, errors.ErrUnsupported }

func (*Handle) Duplicate() (uintptr, error) { return 0, errors.ErrUnsupported }

func (*Handle) Ended() bool { return false }

func (*Handle) Wait() error { return errors.ErrUnsupported }

func (*Handle) WaitFor(time.Duration) error { return errors.ErrUnsupported }

func (*Handle) Kill(time.Duration) error { return errors.ErrUnsupported }

func (*Handle) Close() error { return nil }

func HoldsPipe(int, uint64, PipeEnd) (bool, error) { return false, errors.ErrUnsupported }

func PIDNamespace() string { return "" }

// Parent returns the parent of a process, or 0 if that is unknown.
func Parent(pid int) int {
	if pid == os.Getpid() {
		return os.Getppid()
	}
	return 0
}
