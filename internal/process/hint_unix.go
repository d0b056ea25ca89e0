//go:build unix

package process

import (
	"errors"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// StartHint returns what the reader of err, which came from starting a process, can
// do about it. It is empty where the error says it all.
func StartHint(err error) string {
	var pathError *os.PathError
	switch {
	case errors.As(err, &pathError) && pathError.Op == "chdir":
		return "; create the working directory again, or choose another by Options.Command"
	case errors.Is(err, unix.ENOENT):
		return "; put the new binary, built by go build and not started by go run, where the old one was, or name it by Options.Command"
	case errors.Is(err, unix.EACCES):
		return "; make the new binary executable for this user"
	case errors.Is(err, unix.ETXTBSY):
		return "; write the new binary beside the old one and rename it into place"
	case errors.Is(err, unix.ENOEXEC):
		return "; build the new binary for " + runtime.GOOS + "/" + runtime.GOARCH
	case errors.Is(err, unix.E2BIG):
		return "; the environment, with the names of the descriptors in it, is larger than this system passes on: pass on fewer descriptors, use shorter names, or raise the stack limit (ulimit -s), which on Linux bounds it"
	}
	return LimitHint(err)
}

// LimitHint is StartHint for errors of opening a file.
func LimitHint(err error) string {
	if errors.Is(err, unix.EMFILE) {
		return "; raise the limit of open files (ulimit -n, LimitNOFILE=)"
	}
	return ""
}
