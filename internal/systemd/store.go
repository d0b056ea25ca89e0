package systemd

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
)

// A Store has the manager keep copies of a registry's listeners and packet conns. It is a
// registry.Store. Messages to the manager wait in a queue, so that no call except Flush
// waits for the manager.
type Store struct {
	notifier *Notifier
	wanted   bool

	mu           sync.Mutex
	queue        []storeMessage
	told         chan struct{} // closed once the queue is empty, nil if it is
	failed       []string      // which copies could not be made, for Flush
	unresponsive bool          // the manager does not read: nothing more is sent
}

// A storeMessage is a message in the queue.
type storeMessage struct {
	fields []string
	err    error // why it can't be sent

	// Of the copy that the manager is to make, if any:
	name   nametable.Name
	fdName string
	fd     uintptr // a duplicate for it
}

// NewStore returns a Store. Unless wanted is set, it keeps nothing, and only removes the
// copies that an earlier version has kept.
func (n *Notifier) NewStore(wanted bool) *Store {
	return &Store{notifier: n, wanted: wanted}
}

// Keep sends the manager a copy of a socket that the next process could ask for, unless
// the manager passed the socket or has a copy already.
func (s *Store) Keep(e *nametable.Entry, fd uintptr) (fdName string) {
	switch {
	case nametable.IsStoreName(e.FDName) && !s.wanted:
		s.Remove(e.FDName)
		return ""
	case e.FDName != "" || !s.wanted || e.Kind != nametable.Listener && e.Kind != nametable.PacketConn:
		return e.FDName
	}

	fdName = nametable.StoreName(e.Name)
	// By default, systemd drops a socket on which an error is pending.
	m := storeMessage{fields: []string{"FDSTORE=1", "FDNAME=" + fdName, "FDPOLL=0"}, name: e.Name, fdName: fdName}
	if len(fdName) > 255 {
		m.err = errors.New("its name is too long")
	} else {
		m.fd, m.err = descriptor.Duplicate(fd) // the registry may close fd meanwhile
	}
	if m.err != nil {
		m.err = fmt.Errorf("store %q: %w", e.Name, m.err)
		fdName = ""
	}
	s.enqueue(m)
	return fdName
}

// Remove has the manager close its copies of this name.
func (s *Store) Remove(fdName string) {
	s.enqueue(storeMessage{fields: []string{"FDSTOREREMOVE=1", "FDNAME=" + fdName}})
}

// Flush blocks until all messages have been sent, for BarrierTimeout at most. If the
// manager does not read a message within NotifyTimeout, no more are sent. Flush returns the
// names of the copies that could not be made.
func (s *Store) Flush() (failed []string) {
	s.mu.Lock()
	told := s.told
	s.mu.Unlock()
	if told != nil {
		timeout := time.NewTimer(BarrierTimeout)
		defer timeout.Stop()
		select {
		case <-told:
		case <-timeout.C:
		}
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	failed, s.failed = s.failed, nil
	return failed
}

func (s *Store) enqueue(m storeMessage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue = append(s.queue, m)
	if s.told == nil {
		s.told = make(chan struct{})
		go s.tell()
	}
}

// tell sends the messages in the queue. It logs afterwards, because a Logger may call a
// method that waits in Flush.
func (s *Store) tell() {
	var errs []error
	for {
		m, ok := s.next()
		if !ok {
			break
		}
		if err := s.send(m); err != nil {
			errs = append(errs, err)
		}
	}
	for _, err := range errs {
		s.notifier.log(err)
	}
}

func (s *Store) next() (m storeMessage, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		s.queue = nil
		close(s.told)
		s.told = nil
		return storeMessage{}, false
	}
	m = s.queue[0]
	s.queue = s.queue[1:]
	return m, true
}

func (s *Store) send(m storeMessage) error {
	if m.err != nil {
		return m.err
	}
	var rights []byte
	if m.fdName != "" {
		defer descriptor.Close(m.fd)
		rights = descriptor.Rights(m.fd)
	}
	s.mu.Lock()
	unresponsive := s.unresponsive
	s.mu.Unlock()
	err := errors.New("it did not read what it was sent before")
	if !unresponsive {
		err = s.notifier.send(rights, m.fields...)
	}
	if err == nil {
		return nil
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	s.unresponsive = s.unresponsive || errors.Is(err, os.ErrDeadlineExceeded)
	if m.fdName != "" {
		s.failed = append(s.failed, m.fdName)
		return fmt.Errorf("store %q: %w", m.name, err)
	}
	return err
}
