//go:build unix

package descriptor

import "os"

// firstFree is the first number that is not a standard stream's. If a program has closed
// a standard stream, no pipe or socket of this package may get its number: the runtime
// writes its panics to descriptor 2, whatever that is.
const firstFree = 3

// Pipe returns the ends of a pipe, which are close-on-exec, in blocking mode, and never
// have the numbers of the standard streams. Unlike those of os.Pipe, which are registered
// with the network poller, they can be passed to a child as they are.
func Pipe() (r, w uintptr, err error) {
	r, w, err = openPipe()
	if err != nil {
		return 0, 0, os.NewSyscallError("pipe", err)
	}
	if err = moveAboveStreams(&r); err == nil {
		err = moveAboveStreams(&w)
	}
	if err != nil {
		_ = Close(r)
		_ = Close(w)
		return 0, 0, err
	}
	return r, w, nil
}

// moveAboveStreams puts a duplicate in the place of a descriptor that has the number of a
// standard stream. With an error it leaves the descriptor alone.
func moveAboveStreams(fd *uintptr) error {
	if *fd >= firstFree {
		return nil
	}
	dup, err := Duplicate(*fd)
	if err != nil {
		return err
	}
	_ = Close(*fd)
	*fd = dup
	return nil
}

// PolledFile returns a file of fd, which it owns, in non-blocking mode, so that who waits
// for it takes no thread.
func PolledFile(fd uintptr, name string) (*os.File, error) {
	if err := SetNonblock(fd, true); err != nil {
		_ = Close(fd)
		return nil, err
	}
	return os.NewFile(fd, name), nil
}
