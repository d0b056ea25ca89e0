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
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/tableflip/httpdrain"
)

// What a request costs while nobody drains: batches of 1,000 requests to a bare server and
// to one with a Drainer.
//
//	go test -run xxx -bench Request -benchtime 200x
func BenchmarkRequest(b *testing.B) {
	const batch = 1000
	for _, protocol := range []string{"HTTP/1", "HTTP/1 beside h2c", "TLS", "h2c", "HTTP/2"} {
		b.Run(protocol, func(b *testing.B) {
			requests := [...]func() error{requester(b, protocol, false), requester(b, protocol, true)}
			send := func(drained int) float64 {
				began := time.Now()
				for range batch {
					if err := requests[drained](); err != nil {
						b.Fatal(err)
					}
				}
				return float64(time.Since(began).Nanoseconds()) / batch
			}
			send(0)
			send(1)
			inPairs(b, "ns/request", send)
		})
	}
}

// inPairs makes b.N pairs of measurements, of a bare server (0) and of one with a Drainer
// (1). They take turns, so that what disturbs the machine disturbs both. It reports the
// medians, their ratio, and the quartiles of the pairs' ratios.
func inPairs(b *testing.B, unit string, measure func(drained int) float64) {
	var all [2][]float64
	for i := 0; b.Loop(); i++ {
		for turn := range 2 {
			drained := (i + turn) % 2
			all[drained] = append(all[drained], measure(drained))
		}
	}
	var ratios []float64
	for i, bare := range all[0] {
		ratios = append(ratios, all[1][i]/bare)
	}
	slices.Sort(ratios)
	slices.Sort(all[0])
	slices.Sort(all[1])
	n := len(ratios)
	b.ReportMetric(all[0][n/2], "bare-"+unit)
	b.ReportMetric(all[1][n/2], "drainer-"+unit)
	b.ReportMetric(all[1][n/2]/all[0][n/2], "ratio")
	b.ReportMetric(ratios[n/4], "ratio-q1")
	b.ReportMetric(ratios[n*3/4], "ratio-q3")
	b.ReportMetric(0, "ns/op") // of a pair
}

// requester starts a server, and returns what makes a request on a connection of its own.
func requester(b *testing.B, protocol string, drained bool) func() error {
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
	b.Cleanup(func() { srv.Close() })
	addr := ln.Addr().String()
	if protocol == "TLS" || protocol == "HTTP/2" {
		go serveTLS(ln, "", "")
	} else {
		go serve(ln)
	}
	switch protocol {
	case "HTTP/2":
		return requestOverHTTP2(b, http2Transport(), "https://"+addr)
	case "h2c":
		return requestOverHTTP2(b, plainHTTP2Transport(), "http://"+addr)
	case "TLS":
		return requestOverHTTP1(dialTLS(b, addr, "http/1.1").Conn)
	default:
		return requestOverHTTP1(dial(b, addr).Conn)
	}
}

// requestOverHTTP1 allocates nothing itself.
func requestOverHTTP1(nc net.Conn) func() error {
	nc.SetDeadline(time.Time{})
	request, response := []byte(get("/")), make([]byte, 1000)
	return func() error {
		if _, err := nc.Write(request); err != nil {
			return err
		}
		_, err := nc.Read(response) // which fits into a segment
		return err
	}
}

func requestOverHTTP2(b *testing.B, transport *http.Transport, url string) func() error {
	b.Cleanup(transport.CloseIdleConnections)
	request, err := http.NewRequestWithContext(b.Context(), "GET", url, nil)
	if err != nil {
		b.Fatal(err)
	}
	return func() error {
		response, err := transport.RoundTrip(request)
		if err != nil {
			return err
		}
		io.Copy(io.Discard, response.Body)
		return response.Body.Close()
	}
}

var began = time.Now()

// cpuTime returns the processor time that the process has had, or what has passed where
// that is not known.
var cpuTime = func() time.Duration { return time.Since(began) }

// mostTCP returns how many connections the process may have within itself.
var mostTCP = func() int { return 5000 }

// What a drain costs per connection, and what Server.Shutdown does: it is the same
// however many there are. All connections are idle but for 200, whose requests end one
// after the other.
//
//	go test -run xxx -bench Drain -benchtime 7x
func BenchmarkDrain(b *testing.B) {
	overTCP := func() crowdListener { return tcpListener{listenTCP(b).(*net.TCPListener)} }
	inMemory := func() crowdListener { return newMemory() }
	for _, test := range []struct {
		network string
		listen  func() crowdListener
		n       int
	}{
		{"memory", inMemory, 1000},
		{"memory", inMemory, 10_000},
		{"memory", inMemory, 100_000},
		{"TCP", overTCP, min(mostTCP(), 10_000)},
	} {
		b.Run(fmt.Sprintf("%s/%d", test.network, test.n), func(b *testing.B) {
			inPairs(b, "cpu-ns/connection", func(drained int) float64 {
				c := gather(b, test.listen(), drained == 1, test.n)
				runtime.GC() // of what that has left
				began := cpuTime()
				go c.finish()
				if err := c.shutdown(b.Context()); err != nil {
					b.Fatal(err)
				}
				used := cpuTime() - began
				c.leave()
				return float64(used.Nanoseconds()) / float64(test.n)
			})
		})
	}
}

// crowdListener is a listener that can be dialled.
type crowdListener interface {
	net.Listener
	dial() (net.Conn, error)
}

type tcpListener struct{ *net.TCPListener }

func (l tcpListener) dial() (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) }

// A crowd is a server and the clients that are connected to it.
type crowd struct {
	shutdown func(context.Context) error
	clients  []net.Conn
	entered  chan struct{} // receives from the handlers of requests
	ended    chan struct{} // lets them end
}

// active is how many clients of a crowd wait for a response.
const active = 200

// gather starts a server with n clients.
func gather(b *testing.B, ln crowdListener, drained bool, n int) *crowd {
	c := &crowd{entered: make(chan struct{}), ended: make(chan struct{})}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/active" {
			c.entered <- struct{}{}
			<-c.ended
		}
	})}
	c.shutdown = srv.Shutdown
	serve := srv.Serve
	if drained {
		d := httpdrain.New(srv)
		d.IdleGrace = -1
		c.shutdown, serve = d.Shutdown, d.Serve
	}
	go serve(ln)
	for i := range n {
		nc, err := ln.dial()
		if err != nil {
			b.Fatal(err)
		}
		c.clients = append(c.clients, nc)
		if err := c.greet(nc, i < active); err != nil {
			b.Fatal(err)
		}
	}
	return c
}

// greet sends a request, and waits for the response unless that is to come in the drain.
func (c *crowd) greet(nc net.Conn, isActive bool) error {
	path := "/"
	if isActive {
		path = "/active"
	}
	if _, err := io.WriteString(nc, get(path)); err != nil {
		return err
	}
	if !isActive {
		_, err := nc.Read(make([]byte, 1000))
		return err
	}
	<-c.entered
	go func() {
		io.Copy(io.Discard, nc)
		nc.Close()
	}()
	return nil
}

// finish lets the requests end.
func (c *crowd) finish() {
	for range active {
		c.ended <- struct{}{}
	}
}

func (c *crowd) leave() {
	for _, nc := range c.clients {
		nc.Close()
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
