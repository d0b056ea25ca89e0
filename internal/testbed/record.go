//go:build linux

package main

import (
	"sync"
	"time"
)

// recorder owns the counts. All methods are safe for concurrent use.
type recorder struct {
	mu       sync.Mutex
	kinds    map[string]*counts
	failures []failure
	crashes  []window
	phase    phase
}

// phase says whether the server is being upgraded at present.
type phase int

const (
	upgraded phase = iota
	control
)

// counts is what is known of one kind of client.
type counts struct {
	sent, answered int
	versions       map[int]int
	latency        [2]histogram // by phase
}

// outcome is the end of one exchange.
type outcome struct {
	kind       string
	suspect    time.Time // since when whatever made it fail can have happened
	latency    time.Duration
	version    int
	err        error
	unpromised string // why nothing was promised, if so
}

type failure struct {
	outcome
	at time.Time
}

// window is a time in which a process in charge had been killed and none had
// taken over.
type window struct{ from, to time.Time }

// settling is how long after a crash its consequences may be seen: by clients that
// wait for an answer which will never come.
const settling = 500 * time.Millisecond

func newRecorder() *recorder { return &recorder{kinds: make(map[string]*counts)} }

func (r *recorder) add(o outcome) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.kinds[o.kind]
	if k == nil {
		k = &counts{versions: make(map[int]int)}
		r.kinds[o.kind] = k
	}
	k.sent++
	if o.err != nil {
		r.failures = append(r.failures, failure{o, now})
		return
	}
	k.answered++
	k.versions[o.version]++
	k.latency[r.phase].add(o.latency)
}

func (r *recorder) enter(p phase) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.phase = p
}

func (r *recorder) crashed(w window) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.crashes = append(r.crashes, w)
}

// verdict says whose fault a failure is.
type verdict int

const (
	lost verdict = iota
	crash
	unpromised
)

// judge is called when the run is over.
func (r *recorder) judge(f failure) verdict {
	for _, w := range r.crashes {
		if f.suspect.Before(w.to.Add(settling)) && f.at.After(w.from) {
			return crash
		}
	}
	if f.unpromised != "" {
		return unpromised
	}
	return lost
}
