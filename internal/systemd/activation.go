package systemd

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
)

// The variables of sd_listen_fds(3).
const (
	listenPID   = "LISTEN_PID"
	listenFDs   = "LISTEN_FDS"
	listenNames = "LISTEN_FDNAMES"
	listenPIDFD = "LISTEN_PIDFDID"
)

// FirstFD is the first descriptor that the manager passes.
const FirstFD = 3

// isActivated reports whether the variables are meant for this process, and not for
// an ancestor or, say, the shell script that started it.
func isActivated() bool { return os.Getenv(listenPID) == strconv.Itoa(os.Getpid()) }

// ActivatedFDs returns the descriptors that the manager has opened for this process.
// Sockets are named by network, the manager's network, unless they come from the
// store.
func ActivatedFDs(network string) ([]*nametable.Entry, error) {
	if !isActivated() {
		return nil, nil
	}
	count, err := strconv.ParseUint(os.Getenv(listenFDs), 10, 31)
	if err != nil {
		return nil, fmt.Errorf("tableflip: %s must be the number of the descriptors that were passed: %w (to start without them, unset it and %s)", listenFDs, err, listenPID)
	}

	names := strings.Split(os.Getenv(listenNames), ":")
	var entries []*nametable.Entry
	for i := range int(count) {
		fdName := "unknown" // as sd_listen_fds_with_names(3) has it
		if i < len(names) && names[i] != "" {
			fdName = names[i]
		}
		s, err := descriptor.IdentifySocket(FirstFD + uintptr(i))
		if err != nil {
			return nil, fmt.Errorf("tableflip: inherit descriptor %d, %q, of the %d that %s announces: %w", FirstFD+i, fdName, count, listenFDs, err)
		}
		entries = append(entries, &nametable.Entry{Name: nameOf(s, fdName, network), FDName: fdName})
	}
	return entries, nil
}

// nameOf returns the name of a descriptor that the manager calls fdName. For a Unix socket
// that is not from the store, the name does not contain the path, because the manager
// unlinks the file.
func nameOf(s descriptor.Socket, fdName, network string) nametable.Name {
	kind := kindOf(s)
	if stored, ok := nametable.ParseStoreName(fdName); ok && stored.Kind == kind {
		return stored
	}
	if kind == nametable.File {
		return nametable.Name{Kind: kind, Network: fdName}
	}
	return nametable.Name{Kind: kind, Network: network, Addr: fdName}
}

func kindOf(s descriptor.Socket) string {
	switch {
	case s.Network == "" || s.Network == "ip":
		return nametable.File
	case s.Listening:
		return nametable.Listener
	case s.Datagram:
		return nametable.PacketConn
	default:
		return nametable.Conn
	}
}

// ForgetActivatedFDs removes the variables, so that this process's children do not
// inherit them.
func ForgetActivatedFDs() error {
	if !isActivated() {
		return nil
	}
	return errors.Join(os.Unsetenv(listenPID), os.Unsetenv(listenFDs), os.Unsetenv(listenNames), os.Unsetenv(listenPIDFD))
}
