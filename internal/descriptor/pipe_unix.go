//go:build unix

package descriptor

import "os"

// firstFree is the first number that is not a standard stream's. If a program has closed
// a standard stream, no pipe or socket of this package may get its number: the runtime
// writes its panics to descriptor 2, whatever that is.
const firstFree = 3

// Pipe does what os.Pipe does, but does not use the numbers of the standard streams.
func Pipe() (r, w *os.File, err error) {
	if r, w, err = os.Pipe(); err != nil {
		return nil, nil, err
	}
	if r, err = aboveStreams(r); err == nil {
		w, err = aboveStreams(w)
	}
	if err != nil {
		r.Close()
		w.Close()
		return nil, nil, err
	}
	return r, w, nil
}

// aboveStreams returns file or, if file has the number of a standard stream, a duplicate
// in its place. With an error it returns file.
func aboveStreams(file *os.File) (*os.File, error) {
	var dup uintptr
	err := Control(file, func(fd uintptr) (err error) {
		if fd < firstFree {
			dup, err = Duplicate(fd)
		}
		return err
	})
	if err != nil || dup == 0 {
		return file, err
	}
	file.Close()
	return os.NewFile(dup, file.Name()), nil
}
