//go:build unix

package descriptor

import "os"

// firstFree is the first number that is no standard stream's. A program that has
// closed one must not find a pipe or a socket of this package there: what the runtime
// says when it panics goes to descriptor 2, whatever that is.
const firstFree = 3

// Pipe is os.Pipe, but for the numbers of the standard streams.
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

// aboveStreams returns file, or a duplicate in its place. After an error it is file,
// too.
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
