package service

import (
	"io"
	"net/http"
	"sync/atomic"
)

// A Health answers the health checks of load balancers, as an http.Handler. Pass it to
// [Run] in [Options].Health, and have any server of the process serve it.
//
// It answers 503 until the process is ready, then 200, and 503 again once the process
// has been told to stop, which is when Options.DrainDelay begins. An upgrade does not
// make it fail. The check is for the address, where the new process serves by then: if
// it reaches the old one on a kept connection, it must not take the new one out of
// rotation.
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
