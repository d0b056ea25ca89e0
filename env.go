package tableflip

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/process"
)

// This file decides what the variables mean that were found in the environment at the
// start of the process: a table for this process, one that was lost on its way to it,
// or one that has leaked from another process.

// findTable returns the table of this process, or nil if there is none.
func findTable() (*nametable.Table, error) {
	variables := inherit.Variables()
	if variables == nil {
		if inherit.Lost() {
			return nil, errors.New("tableflip: this process has executed its program anew, after the package had taken " +
				"what the parent passed on: execute the program before that (name it by Options.Command), or after New")
		}
		return nil, nil
	}

	t, err := nametable.Decode(variables)
	var version nametable.UnknownVersionError
	if err != nil && !errors.As(err, &version) {
		return nil, err
	}
	if hasPipes(&t) {
		return &t, err
	}
	if isAwaited(&t) {
		return nil, fmt.Errorf("tableflip: process %d waits for this one, and has passed %d descriptors on to it "+
			"that did not arrive: have what starts the service (a shell script, sudo, a daemon tool) keep descriptors from %d on open, "+
			"or name the binary itself by Options.Command", t.PID, len(t.Entries)+2, inherit.ReadyFD)
	}
	inherit.Forget()
	return nil, nil
}

// hasPipes reports whether the pipes that the table names are there.
func hasPipes(t *nametable.Table) bool {
	ready, readyErr := identifyPipe(inherit.ReadyFD)
	verdict, verdictErr := identifyPipe(inherit.VerdictFD)
	if readyErr != nil || verdictErr != nil {
		return false
	}
	if t.Token != "" {
		if tokenRead == "" {
			tokenRead = readToken(len(t.Token))
		}
		return tokenRead == t.Token
	}
	return ready == t.Ready && verdict == t.Verdict
}

// tokenRead is what was in the verdict pipe, for a New that is tried again.
var tokenRead string

// readToken returns what the parent has written to the verdict pipe.
func readToken(size int) string {
	if readable, _ := descriptor.Poll(inherit.VerdictFD); !readable {
		return ""
	}
	token := make([]byte, size)
	n, _ := syscall.Read(inherit.VerdictFD, token)
	return string(token[:max(n, 0)])
}

func identifyPipe(fd uintptr) (nametable.PipeID, error) {
	device, inode, err := descriptor.IdentifyPipe(fd)
	return nametable.PipeID{Device: device, Inode: inode}, err
}

// isAwaited reports whether the sender of the table still waits for its child, and
// this process could be that: a descendant, or a sibling that it started as a child
// of its parent.
func isAwaited(t *nametable.Table) bool {
	if t.PID == 0 || t.PIDNamespace != process.PIDNamespace() || time.Now().After(t.Until) || !process.IsAlive(t.PID) {
		return false
	}
	if process.Parent(t.PID) == os.Getppid() {
		return true
	}
	for pid := os.Getpid(); pid > 1; pid = process.Parent(pid) {
		if pid == t.PID {
			return true
		}
	}
	return false
}
