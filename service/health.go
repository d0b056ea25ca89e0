package service

import (
	"io"
	"net/http"
	"sync/atomic"
)

// A Health answers the health checks of load balancers, as an http.Handler. It must
// be given to Run by Options.Health, and can be asked by any server of the process.
//
// It answers 200 as soon as the process is ready, and 503 before, and once the
// process was told to stop: SIGTERM has arrived, and DrainDelay begins. It does not
// fail because the process was replaced by an upgrade: the check is for the address,
// where the new process serves by then, and a check that still reaches the old one,
// by a connection that was kept, must not take the new one out of the rotation.
//
// The zero value is ready to use. Its method is safe for concurrent use.
type Health struct{ state atomic.Int32 }

const (
	starting int32 = iota
	healthy
	stopping
)

// ServeHTTP answers one check.
func (h *Health) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	switch h.state.Load() {
	case healthy:
		io.WriteString(w, "ok\n")
	case starting:
		http.Error(w, "starting", http.StatusServiceUnavailable)
	default:
		http.Error(w, "stopping", http.StatusServiceUnavailable)
	}
}

// succeed is called when the process is ready. It may have been told to stop by then.
func (h *Health) succeed() {
	if h != nil {
		h.state.CompareAndSwap(starting, healthy)
	}
}

func (h *Health) fail() {
	if h != nil {
		h.state.Store(stopping)
	}
}
