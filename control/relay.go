package control

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/link"
)

// This file owns what a process that drains says of that: to those who watch it, and to
// its successor, for the status and the counters.

// meeting is the name of the file by which generations find each other.
const meeting = "tableflip/control"

// sendTimeout is how long a process that drains waits for its successor, which may be
// suspended.
const sendTimeout = time.Second / 2

// A report is what a process tells its successor.
type report struct {
	PID         int       `json:"pid"`
	Counters    *Counters `json:"counters,omitempty"`    // when it is replaced
	Connections *int      `json:"connections,omitempty"` // while it drains
	Cut         int       `json:"cut,omitempty"`         // connections, when it has drained
}

// A relay passes reports from each generation to the next.
type relay struct {
	meeting *link.Meeting // nil if there is none
	link    *link.Link    // to the successor, nil if there is none

	mu          sync.Mutex
	connections map[int]int // of those that drain, by PID
}

// join never fails: without a meeting the status says less.
func (s *Server) join() {
	m, err := link.Join(s.upg, meeting)
	if err != nil {
		s.opts.Logger.Error("control: the status will not say what other generations do", "error", err)
		return
	}
	s.relay.meeting = m
}

// hear heeds what older generations report, until their ends or Close.
func (s *Server) hear() {
	if s.relay.meeting == nil {
		return
	}
	for _, l := range s.relay.meeting.Older() {
		go func() {
			for {
				message, files, err := l.Receive(context.Background())
				for _, file := range files { // of a later version
					file.Close()
				}
				if err != nil {
					return
				}
				var r report
				if json.Unmarshal(message, &r) == nil {
					s.heed(r)
				}
			}
		}()
	}
}

func (s *Server) heed(r report) {
	if r.Connections != nil {
		s.relay.mu.Lock()
		s.relay.connections[r.PID] = *r.Connections
		s.relay.mu.Unlock()
	}
	s.history.change(func(m *memory) {
		if r.Counters != nil {
			m.counters.add(*r.Counters)
		}
		m.counters.ConnectionsCut += r.Cut
	})
}

// connectionsOf returns what a process that drains has reported last, or nil.
func (s *Server) connectionsOf(pid int) *int {
	s.relay.mu.Lock()
	defer s.relay.mu.Unlock()
	n, ok := s.relay.connections[pid]
	if !ok {
		return nil
	}
	return &n
}

// tellDrain tells how the drain goes on, until Close, and then how it has ended.
func (s *Server) tellDrain() {
	self, _ := s.generations()
	if s.upg.Replaced() {
		counters := s.Counters()
		s.report(report{PID: self.PID, Counters: &counters})
	}
	if s.opts.Connections != nil {
		s.tellConnections(self)
	}
	<-s.closing
	if s.opts.Cut != nil {
		s.report(report{PID: self.PID, Cut: s.opts.Cut()})
	}
	if s.relay.link != nil {
		s.relay.link.Close()
	}
}

// tellConnections tells how many connections are left each time that they have changed.
func (s *Server) tellConnections(self generation) {
	tick := time.NewTicker(drainInterval)
	defer tick.Stop()
	for told := -1; ; {
		if n := s.opts.Connections(); n != told {
			told = n
			event.Publish(nil, slog.LevelInfo, event.Draining,
				slog.Int("pid", self.PID), slog.Int("generation", self.Number), slog.Int("connections", n))
			s.report(report{PID: self.PID, Connections: &n})
		}
		select {
		case <-tick.C:
		case <-s.closing:
			return
		}
	}
}

// report sends r to the successor, if there is one that listens.
func (s *Server) report(r report) {
	if s.relay.meeting == nil || !s.upg.Replaced() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), sendTimeout)
	defer cancel()
	for {
		if s.relay.link == nil {
			l, err := s.relay.meeting.Accept(ctx)
			if err != nil {
				return
			}
			s.relay.link = l
		}
		err := s.relay.link.Send(ctx, encode(r))
		if !errors.Is(err, io.EOF) {
			return
		}
		// That was a child that had failed, or was replaced.
		s.relay.link.Close()
		s.relay.link = nil
	}
}
