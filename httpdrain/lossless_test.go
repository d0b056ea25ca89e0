package httpdrain_test

import (
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/tableflip/internal/load"
)

// By hand, because no test may depend on the scheduler, and net/http's client does:
// see "What remains" in the package's documentation.
//
//	go test -v -run UnrepeatableStreams -drains=50 -hogs=2 -rtt=50ms -deadline=200ms
var (
	drains   = flag.Int("drains", 0, "how many drains TestUnrepeatableStreams makes")
	hogs     = flag.Int("hogs", 0, "how many goroutines keep processors busy meanwhile")
	rtt      = flag.Duration("rtt", 0, "the round trip between its clients and the service")
	deadline = flag.Duration("deadline", patience, "the deadline of its requests, which the handler sometimes nearly meets")
	noDrain  = flag.Bool("no-drain", false, "make no drains, but wait for as long as they take: the control")
)

// Clients that cannot repeat a request, and have many on one connection, lose
// none while the service is replaced again and again.
func TestUnrepeatableStreams(t *testing.T) {
	if *drains == 0 {
		t.Skip("made by hand, with -drains")
	}
	eachHTTP2(t, func(t *testing.T, c config, newTransport func() *http.Transport, scheme string) {
		ln := listenTCP(t).(*net.TCPListener)
		defer ln.Close()
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch {
			case *deadline == patience || rand.N(2) == 0:
			case rand.N(10) > 0:
				time.Sleep(rand.N(20 * time.Millisecond)) // the work that a request is
			default:
				time.Sleep(rand.N(max(*deadline-*rtt-30*time.Millisecond, time.Millisecond))) // as much as the deadline allows
			}
			echo(w, r)
		})
		c.server = func(s *http.Server) {
			s.Protocols.SetUnencryptedHTTP2(!c.tls)
			s.WriteTimeout = time.Second
		}
		c.listen = func() net.Listener { return duplicate(t, ln) }
		current := start(t, c)
		near, err := load.Link{RoundTrip: *rtt}.Listen(t.Context(), current.addr)
		if err != nil {
			t.Fatal(err)
		}
		url := scheme + near
		var stop atomic.Bool
		var busy sync.WaitGroup
		for range *hogs {
			busy.Go(func() {
				for !stop.Load() {
				}
			})
		}
		var served, late, connecting, failed atomic.Int64
		for range 3 {
			transport := newTransport()
			defer transport.CloseIdleConnections()
			for i := range 12 {
				busy.Go(func() {
					for !stop.Load() {
						ctx, cancel := context.WithTimeout(t.Context(), *deadline)
						begin := time.Now()
						var connected time.Duration
						a, _, err := ask(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
							GotConn: func(httptrace.GotConnInfo) { connected = time.Since(begin) },
						}), transport, url, "body")
						cancel()
						switch {
						case errors.Is(err, context.DeadlineExceeded) && (connected == 0 || connected > *rtt/2+5*time.Millisecond):
							connecting.Add(1)
							continue
						case errors.Is(err, context.DeadlineExceeded):
							late.Add(1)
							continue
						case err != nil:
							if failed.Add(1) < 4 {
								t.Log(err)
							}
							continue
						}
						a.is(t, "body")
						served.Add(1)
						if i%2 == 0 {
							time.Sleep(rand.N(10 * time.Millisecond)) // the pace; the others have their next request at once
						}
					}
				})
			}
		}
		time.Sleep(3 * *rtt) // for clients to have connected
		begin := time.Now()
		for range *drains {
			if *noDrain {
				time.Sleep(300*time.Millisecond + 3**rtt) // the pace
				continue
			}
			next := start(t, c)
			result := current.drain(t.Context())
			current.finished(result)
			current = next
			time.Sleep(200*time.Millisecond + 3**rtt) // the pace
		}
		stop.Store(true)
		busy.Wait()
		t.Logf("%d drains in %v: %d requests served, %d failed, %d late, %d late because they had to connect", *drains, time.Since(begin).Round(time.Millisecond), served.Load(), failed.Load(), late.Load(), connecting.Load())
		if failed.Load() > 0 {
			t.Error("requests failed")
		}
	})
}
