package systemd

import (
	"errors"
	"fmt"
	"os"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
)

// A Store has the manager keep copies of a registry's listeners and packet conns. It
// is a registry.Store, and relies on the registry's lock.
type Store struct {
	notifier     *Notifier
	wanted       bool
	unresponsive bool // the manager does not read what it is sent: no more is
}

// NewStore returns a Store that keeps nothing, but removes what an earlier version
// has kept, unless it is wanted.
func (n *Notifier) NewStore(wanted bool) *Store {
	return &Store{notifier: n, wanted: wanted}
}

// Keep sends the manager a copy of a socket that the next process could ask for,
// unless the manager passed it or has a copy.
func (s *Store) Keep(e *nametable.Entry, fd uintptr) (fdName string) {
	switch {
	case nametable.IsStoreName(e.FDName) && !s.wanted:
		s.Remove(e.FDName)
		return ""
	case e.FDName != "" || !s.wanted || e.Kind != nametable.Listener && e.Kind != nametable.PacketConn:
		return e.FDName
	}

	fdName = nametable.StoreName(e.Name)
	err := errors.New("its name is too long")
	if len(fdName) <= 255 {
		// Left to itself, systemd drops a socket on which an error is pending.
		err = s.send(descriptor.Rights(fd), "FDSTORE=1", "FDNAME="+fdName, "FDPOLL=0")
	}
	if err != nil {
		s.notifier.log(fmt.Errorf("store %q: %w", e.Name, err))
		return ""
	}
	return fdName
}

// Remove has the manager close its copies of this name.
func (s *Store) Remove(fdName string) {
	s.notifier.log(s.send(nil, "FDSTOREREMOVE=1", "FDNAME="+fdName))
}

func (s *Store) send(rights []byte, fields ...string) error {
	if s.unresponsive {
		return errors.New("it did not read what it was sent before")
	}
	err := s.notifier.send(rights, fields...)
	s.unresponsive = errors.Is(err, os.ErrDeadlineExceeded)
	return err
}
