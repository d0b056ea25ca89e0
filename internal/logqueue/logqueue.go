// Package logqueue holds log records back while a method runs. The log's handler is the
// program's own code, and might call that method, or wait for it.
package logqueue

import (
	"context"
	"log/slog"
	"sync"
)

// A Queue holds records while at least one method is under way, and until those before them
// have been handled. Its zero value is ready to use.
type Queue struct {
	mu       sync.Mutex
	methods  int // under way
	handlers int // releases that handle records
	pauses   int // that handle records, which no release overtakes
	records  []record
}

type record struct {
	ctx     context.Context
	handler slog.Handler
	slog.Record
}

// Logger returns a logger whose records reach logger's handler from a goroutine that
// holds nothing, or nil if logger is nil.
func (q *Queue) Logger(logger *slog.Logger) *slog.Logger {
	if logger == nil {
		return nil
	}
	return slog.New(handler{logger.Handler(), q})
}

// Hold is called when a method begins. The method calls release once, when it holds no
// lock and nobody waits for it any more. Held records are handled before the last release
// returns.
func (q *Queue) Hold() (release func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.methods++
	return q.release
}

// Pause is called by a method before it waits for long, while it holds no lock. Records are
// handled, as when the method returns, until the method calls resume. It does not wait for
// them, nor does the release of a method that returns meanwhile, because a handler may wait
// for the method.
func (q *Queue) Pause() (resume func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.methods--
	q.pauses++
	go func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.handleAllLocked()
		q.pauses--
	}()
	return func() { q.Hold() }
}

func (q *Queue) release() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.methods--
	if q.pauses == 0 {
		q.handleAllLocked()
	}
}

func (q *Queue) handleAllLocked() {
	for q.methods == 0 && len(q.records) > 0 {
		held := q.records
		q.records = nil
		q.handleLocked(held)
	}
}

// handleLocked unlocks q.mu while the program's code runs, which may panic.
func (q *Queue) handleLocked(held []record) {
	q.handlers++
	q.mu.Unlock()
	defer func() {
		q.mu.Lock()
		q.handlers--
	}()
	for _, r := range held {
		if r.handler.Enabled(r.ctx, r.Level) {
			_ = r.handler.Handle(r.ctx, r.Record)
		}
	}
}

// hold keeps r if it has to wait, and reports whether it has.
func (q *Queue) hold(r record) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.isHoldingLocked() {
		return false
	}
	q.records = append(q.records, r)
	return true
}

func (q *Queue) isHolding() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.isHoldingLocked()
}

func (q *Queue) isHoldingLocked() bool { return q.methods > 0 || q.handlers > 0 || q.pauses > 0 }

// A handler passes records to the program's handler, by way of a queue.
type handler struct {
	next  slog.Handler
	queue *Queue
}

// Enabled does not ask the program's handler while records are held.
func (h handler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.queue.isHolding() || h.next.Enabled(ctx, level)
}

func (h handler) Handle(ctx context.Context, r slog.Record) error {
	if h.queue.hold(record{ctx, h.next, r.Clone()}) {
		return nil
	}
	return h.next.Handle(ctx, r)
}

func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return handler{h.next.WithAttrs(attrs), h.queue}
}

func (h handler) WithGroup(name string) slog.Handler {
	return handler{h.next.WithGroup(name), h.queue}
}
