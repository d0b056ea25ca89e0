//go:build linux

package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
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
			l, err := startLoad(t.Context(), fake(server), []kind{
				{name: "new POST", clients: 2, post: true, fresh: true, pause: upTo(1)},
				{name: "keep-alive POST", clients: 2, post: true, pause: upTo(1)},
			})
			if err != nil {
				t.Fatal(err)
			}
			warm.Store(true)
			<-enough
			l.stop()
			failed := int64(0)
			for _, r := range l.copyRequests() {
				if r.failure != "" {
					failed++
				}
			}
			if failed != spoiled.Load() || failed == 0 {
				t.Errorf("counted %d failed requests, want %d", failed, spoiled.Load())
			}
			if len(l.copyRequests()) != int(answered.Load()) {
				t.Errorf("counted %d requests, want %d", len(l.copyRequests()), answered.Load())
			}
		})
	}
}

// Net/http must not hide a loss by sending a POST again, except by HTTP/2, where the
// server says that it has not processed it.
func TestBodiesCannotBeReplayed(t *testing.T) {
	posts := 0
	for _, k := range slices.Concat(kinds, steadyKinds) {
		c := &client{load: &load{server: &server{}}, kind: k, http: &http.Client{}}
		for range 2 {
			req, err := c.request()
			if err != nil {
				t.Fatal(err)
			}
			if req.Method != "POST" {
				continue
			}
			posts++
			if replayable := req.GetBody != nil; replayable != k.http2 {
				t.Errorf("%s: the body can be replayed: %t", k.name, replayable)
			}
		}
	}
	if posts == 0 {
		t.Error("no kind of client sends a POST")
	}
}

// A server that does not answer properly without any upgrade is not measured.
func TestBadServerIsNotMeasured(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	_, err := startLoad(t.Context(), fake(server), []kind{{name: "new GET", clients: 1, fresh: true, pause: upTo(1)}})
	if err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("got the error %v, want one that names the status", err)
	}
}

// A scheduled request that is late because of the one before it began when it was due.
func TestSlownessIsNotOmitted(t *testing.T) {
	const stall = 200 * time.Millisecond
	var answered atomic.Int64
	enough := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch answered.Add(1) {
		case 5:
			time.Sleep(stall)
		case 20:
			close(enough)
		}
		fmt.Fprintln(w, os.Getpid())
	}))
	defer server.Close()
	l, err := startLoad(t.Context(), fake(server), []kind{{name: "GET", clients: 1, schedule: true, pause: every(10)}})
	if err != nil {
		t.Fatal(err)
	}
	<-enough
	l.stop()
	slow := 0
	for _, r := range l.copyRequests() {
		if r.end-r.begin > stall/4 {
			slow++
		}
	}
	// 20 requests were due while the server stalled; three quarters of them waited
	// for longer than that, in so far as they are among the first 20.
	if slow < 10 {
		t.Errorf("%d requests were slow, want all that were due during the stall", slow)
	}
}

// fake is a peer's server that the test plays.
func fake(s *httptest.Server) *server {
	return &server{peer: &peer{name: "fake"}, plain: s.Listener.Addr().String()}
}
