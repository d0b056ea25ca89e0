package httpdrain_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"example.com/tableflip/httpdrain"
)

// What a request costs while nobody drains: the bare server's time and
// allocations, and those with a Drainer.
func BenchmarkRequest(b *testing.B) {
	for _, protocol := range []string{"HTTP/1", "HTTP/1 beside h2c", "h2c", "HTTP/2"} {
		for _, drained := range []bool{false, true} {
			name := protocol + "/bare"
			if drained {
				name = protocol + "/httpdrain"
			}
			b.Run(name, func(b *testing.B) {
				srv := &http.Server{
					Handler:   http.HandlerFunc(hello),
					TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate()}},
					Protocols: new(http.Protocols),
				}
				srv.Protocols.SetHTTP1(true)
				srv.Protocols.SetHTTP2(true)
				srv.Protocols.SetUnencryptedHTTP2(strings.HasSuffix(protocol, "h2c"))
				serve, serveTLS := srv.Serve, srv.ServeTLS
				if drained {
					d := httpdrain.New(srv)
					serve, serveTLS = d.Serve, d.ServeTLS
				}
				ln := listenTCP(b)
				defer srv.Close()
				switch addr := ln.Addr().String(); protocol {
				case "HTTP/2":
					go serveTLS(ln, "", "")
					requestOverHTTP2(b, http2Transport(), "https://"+addr)
				case "h2c":
					go serve(ln)
					requestOverHTTP2(b, plainHTTP2Transport(), "http://"+addr)
				default:
					go serve(ln)
					requestOverHTTP1(b, addr)
				}
			})
		}
	}
}

// requestOverHTTP1 allocates nothing itself.
func requestOverHTTP1(b *testing.B, addr string) {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer nc.Close()
	request, response := []byte(get("/")), make([]byte, 1000)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := nc.Write(request); err != nil {
			b.Fatal(err)
		}
		// The response fits into a segment.
		if _, err := nc.Read(response); err != nil {
			b.Fatal(err)
		}
	}
}

func requestOverHTTP2(b *testing.B, transport *http.Transport, url string) {
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(b.Context(), "GET", url, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		response, err := transport.RoundTrip(request)
		if err != nil {
			b.Fatal(err)
		}
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
	}
}

// cpuTime returns the processor time that the process has had, where that is known.
var cpuTime = func() time.Duration { return 0 }

// What a drain costs per connection: it is the same however many there are. All
// connections are idle but for 200, whose requests end one after the other.
func BenchmarkDrain(b *testing.B) {
	for _, n := range []int{1000, 10_000, 100_000} {
		for _, by := range []string{"Server.Shutdown", "Drainer.Shutdown"} {
			b.Run(fmt.Sprintf("%s/%d", by, n), func(b *testing.B) {
				var used time.Duration
				for b.Loop() {
					b.StopTimer()
					shutdown, finish := manyConnections(b, by == "Drainer.Shutdown", n)
					runtime.GC() // of what that has left
					began := cpuTime()
					b.StartTimer()
					go finish()
					if err := shutdown(b.Context()); err != nil {
						b.Fatal(err)
					}
					used += cpuTime() - began
				}
				b.ReportMetric(float64(used.Nanoseconds())/float64(b.N*n), "cpu-ns/connection")
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/connection")
			})
		}
	}
}

// manyConnections returns what ends a server with n connections in memory, and what
// lets the requests end that it is answering.
func manyConnections(b *testing.B, drained bool, n int) (shutdown func(context.Context) error, finish func()) {
	const active = 200
	entered, ended := make(chan struct{}), make(chan struct{})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/active" {
			entered <- struct{}{}
			<-ended
		}
	})}
	shutdown = srv.Shutdown
	serve := srv.Serve
	if drained {
		d := httpdrain.New(srv)
		d.IdleGrace = -1
		shutdown, serve = d.Shutdown, d.Serve
	}
	m := newMemory()
	go serve(m)
	for i := range n {
		nc, err := m.dial()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { nc.Close() })
		path := "/"
		if i < active {
			path = "/active"
		}
		if _, err := io.WriteString(nc, get(path)); err != nil {
			b.Fatal(err)
		}
		if i < active {
			<-entered
			go func() {
				io.Copy(io.Discard, nc)
				nc.Close()
			}()
			continue
		}
		if _, err := nc.Read(make([]byte, 1000)); err != nil {
			b.Fatal(err)
		}
	}
	return shutdown, func() {
		for range active {
			ended <- struct{}{}
		}
	}
}

// A request costs no allocation more than on the bare server.
func TestAllocations(t *testing.T) {
	allocations := func(drained, http2 bool) float64 {
		srv := &http.Server{Handler: http.HandlerFunc(hello), Protocols: new(http.Protocols)}
		srv.Protocols.SetHTTP1(true)
		srv.Protocols.SetUnencryptedHTTP2(http2)
		serve := srv.Serve
		if drained {
			serve = httpdrain.New(srv).Serve
		}
		ln := listenTCP(t)
		defer srv.Close()
		go serve(ln)
		if http2 {
			transport := plainHTTP2Transport()
			defer transport.CloseIdleConnections()
			request := throughTransport(transport, "http://"+ln.Addr().String())
			return testing.AllocsPerRun(300, func() {
				if err := request("GET", ""); err == nil {
					t.Error("the response is not hello")
				}
			})
		}
		c := dial(t, ln.Addr().String())
		request, response := []byte(get("/")), make([]byte, 1000)
		return testing.AllocsPerRun(300, func() {
			c.Write(request)
			c.Read(response)
		})
	}
	for _, http2 := range []bool{false, true} {
		bare, drained := math.Inf(1), math.Inf(1)
		for range 3 {
			bare = min(bare, allocations(false, http2))
			drained = min(drained, allocations(true, http2))
		}
		// The race detector has pools forget at random, which makes half of one.
		// What is called when a connection changes its state is called twice a request.
		if drained > bare+1 {
			t.Errorf("HTTP/2 %t: %v allocations per request, %v on the bare server", http2, drained, bare)
		}
	}
}
