// Package load has the clients of a service that is upgraded under load. A client makes
// one exchange after another, checks the whole answer, and never repeats an exchange that
// has failed. net/http does not repeat it either if it has a body, because the body cannot
// be sent again.
//
// The package knows nothing of upgrades. Its caller decides whose fault a failure is.
package load

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// A Kind is one way to be a client.
type Kind struct {
	Name    string
	Clients int
	Workers int // of each client: they share what New returns. Zero means one.

	// Pause returns the time from the end of an exchange to the next one.
	Pause func(*rand.Rand) time.Duration

	// Schedule makes exchanges due at fixed times, a Pause apart. An exchange that a
	// slow answer delays began when it was due, and counts as slow, too.
	Schedule bool

	// New is called once per client. What it returns is called by the workers.
	New func() Exchanger
}

// An Exchanger makes an exchange that began at the given time, or several, and records
// each. It does not give one up because ctx is done. It is safe for concurrent use if
// its kind has several workers.
type Exchanger func(ctx context.Context, w *Worker, began time.Time)

// An Exchange is what became of a request.
type Exchange struct {
	Kind string

	// Began is since when whatever made the exchange fail can have happened.
	Began, Ended time.Time

	Latency time.Duration // until the answer, or its head, was there
	Idle    time.Duration // of the connection, before that
	Opened  int           // connections, for this exchange
	By      int           // who answered, if anybody did
	Err     error
}

// A Worker makes one exchange at a time.
type Worker struct {
	Random *rand.Rand // its own

	kind   string
	record func(Exchange)
}

// Record records an exchange of the worker's kind, which ends now.
func (w *Worker) Record(e Exchange) {
	e.Kind, e.Ended = w.kind, time.Now()
	w.record(e)
}

// A Load is clients at work.
type Load struct {
	running sync.WaitGroup
	first   sync.WaitGroup // the workers' first exchanges
}

// Start starts the clients of all kinds, which work until ctx is done. It calls record
// with each exchange, from several goroutines. The seed determines all that is random.
func Start(ctx context.Context, kinds []Kind, seed uint64, record func(Exchange)) *Load {
	l := new(Load)
	n := uint64(0)
	for _, k := range kinds {
		for range k.Clients {
			exchange := k.New()
			for range max(1, k.Workers) {
				n++
				w := &Worker{rand.New(rand.NewPCG(seed, n)), k.Name, record}
				l.first.Add(1)
				l.running.Go(func() { l.work(ctx, w, k, exchange) })
			}
		}
	}
	return l
}

// AwaitFirst waits until each worker has made an exchange.
func (l *Load) AwaitFirst() { l.first.Wait() }

// Wait waits until ctx is done and the workers have finished what they had begun.
func (l *Load) Wait() { l.running.Wait() }

func (l *Load) work(ctx context.Context, w *Worker, k Kind, exchange Exchanger) {
	exchange(ctx, w, time.Now())
	l.first.Done()

	// Not all at once.
	due := time.Now().Add(time.Duration(w.Random.Float64() * float64(k.Pause(w.Random))))
	for Sleep(ctx, time.Until(due)) {
		began := time.Now()
		// A short delay is the timer's, not the server's.
		if k.Schedule && began.Sub(due) > 2*time.Millisecond {
			began = due
		}
		exchange(ctx, w, began)
		if !k.Schedule {
			due = time.Now()
		}
		due = due.Add(k.Pause(w.Random))
	}
}

// UpTo returns a pause that is anything up to d.
func UpTo(d time.Duration) func(*rand.Rand) time.Duration {
	return func(random *rand.Rand) time.Duration { return time.Duration(random.Float64() * float64(d)) }
}

// Sleep pauses for d. It reports false at once when ctx is done.
func Sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
