//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// This file owns the log. It must never block the supervisor, even if nobody reads it any
// more.

// flushTimeout is how long the end waits for records and messages that have not been
// written yet. Tests make it longer.
var flushTimeout = time.Second

// A journal writes records in a goroutine of its own, and drops records if too many wait.
type journal struct {
	handler slog.Handler
	records chan slog.Record
	dropped atomic.Int64
	closing chan struct{}
	closed  chan struct{}
}

func openJournal(handler slog.Handler) *journal {
	j := &journal{
		handler: handler,
		records: make(chan slog.Record, 256),
		closing: make(chan struct{}),
		closed:  make(chan struct{}),
	}
	go func() {
		defer close(j.closed)
		for {
			select {
			case record := <-j.records:
				j.write(record)
			case <-j.closing:
				for len(j.records) > 0 {
					j.write(<-j.records)
				}
				return
			}
		}
	}()
	return j
}

func (j *journal) write(record slog.Record) {
	_ = j.handler.Handle(context.Background(), record)
	if n := j.dropped.Swap(0); n > 0 {
		lost := slog.NewRecord(time.Now(), slog.LevelWarn, "the log was not read: records are missing", 0)
		lost.Add("count", n)
		_ = j.handler.Handle(context.Background(), lost)
	}
}

// close waits until all records are written, for flushTimeout at most.
func (j *journal) close() {
	close(j.closing)
	select {
	case <-j.closed:
	case <-time.After(flushTimeout):
	}
}

func (j *journal) log(level slog.Level, message string, args ...any) {
	if !j.handler.Enabled(context.Background(), level) {
		return
	}
	record := slog.NewRecord(time.Now(), level, message, 0)
	record.Add(args...)
	select {
	case j.records <- record:
	default:
		j.dropped.Add(1)
	}
}

func (j *journal) info(message string, args ...any)  { j.log(slog.LevelInfo, message, args...) }
func (j *journal) warn(message string, args ...any)  { j.log(slog.LevelWarn, message, args...) }
func (j *journal) error(message string, args ...any) { j.log(slog.LevelError, message, args...) }
