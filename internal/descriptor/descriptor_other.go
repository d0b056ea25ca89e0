//go:build !unix

package descriptor

import (
	"errors"
	"os"
)

// Supported reports whether this system can pass sockets to another process.
const Supported = false

func Duplicate(uintptr) (uintptr, error) { return 0, errors.ErrUnsupported }

func Replace(target, fd uintptr) error { return errors.ErrUnsupported }

func SetCloseOnExec(first uintptr, n int) (uintptr, error) { return first, errors.ErrUnsupported }

func IsCloseOnExec(uintptr) (bool, error) { return false, errors.ErrUnsupported }

func AccessMode(uintptr) (int, error) { return 0, errors.ErrUnsupported }

func SetNonblock(uintptr, bool) error { return errors.ErrUnsupported }

func Close(uintptr) error { return errors.ErrUnsupported }

func CloseAll([]uintptr) error { return errors.ErrUnsupported }

func Poll(uintptr) (readable, hungUp bool) { return false, false }

var UniquePipes = false

func IdentifyPipe(uintptr) (device, inode uint64, err error) { return 0, 0, errors.ErrUnsupported }

func IdentifySocket(uintptr) (Socket, error) { return Socket{}, errors.ErrUnsupported }

func Rights(uintptr) []byte { return nil }

func Send(uintptr, []byte, []byte) error { return errors.ErrUnsupported }

func IsBlocked(error) bool { return false }

func IsFull(error) bool { return false }

func IsClosed(error) bool { return false }

func IsAddrInUse(error) bool { return false }

func Pipe() (r, w uintptr, err error) { return 0, 0, errors.ErrUnsupported }

func PolledFile(uintptr, string) (*os.File, error) { return nil, errors.ErrUnsupported }

func IsDead(string) bool { return false }

func IdentifyFile(string, bool) (string, bool, error) { return "", false, errors.ErrUnsupported }

func ListenAgain(uintptr) error { return errors.ErrUnsupported }
