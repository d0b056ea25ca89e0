//go:build unix

package process

import (
	"os"

	"example.com/tableflip/internal/descriptor"
)

// These are the standard streams by number, and are never closed. The variables of package
// os may hold other files, such as a pipe that this process reads itself, and may be
// closed while their numbers are in use.
var stdin, stdout, stderr = os.NewFile(0, "/dev/stdin"), os.NewFile(1, "/dev/stdout"), os.NewFile(2, "/dev/stderr")

// Streams returns the files of descriptors 0 to 2. They mean whatever has these numbers
// when a process is started. The caller must not close them.
func Streams() (in, out, err *os.File) { return stdin, stdout, stderr }

// isStream reports whether the open file that has file's number now is a standard stream.
// If a standard stream was closed, the next file that is opened gets its number. That file
// has close-on-exec set.
func isStream(file *os.File) bool {
	if file != stdin && file != stdout && file != stderr {
		return true // chosen by Options.Command
	}
	stream := false
	_ = descriptor.Control(file, func(fd uintptr) error {
		closes, err := descriptor.IsCloseOnExec(fd)
		stream = err == nil && !closes
		return err
	})
	return stream
}
