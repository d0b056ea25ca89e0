//go:build linux

package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/tableflip/internal/load"
)

// A loss of each sort must be counted, and as often as it happened: what the server
// spoils, the transport must not repeat.
func TestLossesAreCounted(t *testing.T) {
	for name, spoil := range map[string]func(http.ResponseWriter){
		"connection closed":  func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
		"status 502":         func(w http.ResponseWriter) { http.Error(w, "", http.StatusBadGateway) },
		"another content":    func(w http.ResponseWriter) { fmt.Fprintln(w, "it works") },
		"incomplete content": func(w http.ResponseWriter) { w.Header().Set("Content-Length", "20"); fmt.Fprint(w, os.Getpid()) },
		"no last byte":       func(w http.ResponseWriter) { fmt.Fprint(w, os.Getpid()) },
	} {
		t.Run(name, func(t *testing.T) {
			var warm atomic.Bool
			var answered, spoiled atomic.Int64
			enough := make(chan struct{})
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				n := answered.Add(1)
				if n == 100 {
					close(enough)
				}
				if warm.Load() && n%5 == 0 {
					spoiled.Add(1)
					spoil(w)
					return
				}
				fmt.Fprintln(w, os.Getpid())
			}))
			defer server.Close()
			pause := load.UpTo(time.Millisecond)
			addr := server.Listener.Addr().String()
			tr, err := startTraffic(t.Context(), fake, []load.Kind{
				{Name: "new POST", Clients: 2, Pause: pause, New: load.HTTP{Addr: addr, Fresh: true, Ask: post}.New},
				{Name: "keep-alive POST", Clients: 2, Pause: pause, New: load.HTTP{Addr: addr, Ask: post}.New},
			})
			if err != nil {
				t.Fatal(err)
			}
			warm.Store(true)
			<-enough
			tr.stop()
			failed := int64(0)
			for _, r := range tr.copyRequests() {
				if r.failure != "" {
					failed++
				}
			}
			if failed != spoiled.Load() || failed == 0 {
				t.Errorf("counted %d failed requests, want %d", failed, spoiled.Load())
			}
			if len(tr.copyRequests()) != int(answered.Load()) {
				t.Errorf("counted %d requests, want %d", len(tr.copyRequests()), answered.Load())
			}
		})
	}
}

// A server that does not answer properly without any upgrade is not measured.
func TestBadServerIsNotMeasured(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	get := load.HTTP{Addr: server.Listener.Addr().String(), Ask: get}
	_, err := startTraffic(t.Context(), fake, []load.Kind{{Name: "GET", Clients: 1, Pause: load.UpTo(time.Millisecond), New: get.New}})
	if err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("got the error %v, want one that names the status", err)
	}
}

// Upgrades are made under 16 clients.
func TestKinds(t *testing.T) {
	clients := 0
	for _, k := range kindsFor(new(server)) {
		clients += k.Clients * max(1, k.Workers)
	}
	if clients != 16 {
		t.Errorf("%d clients, want 16, as the report says", clients)
	}
}

// fake is a peer's server that the test plays.
var fake = &server{peer: &peer{name: "fake"}}
