package httpdrain_test

import (
	"flag"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// By hand, as no test may depend on the scheduler, and net/http's client does: see
// "What remains" in the package's documentation.
//
//	go test -v -run UnrepeatableStreams -drains=50 -hogs=2
var (
	drains = flag.Int("drains", 0, "how many drains TestUnrepeatableStreams makes")
	hogs   = flag.Int("hogs", 0, "how many goroutines keep processors busy meanwhile")
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
		c.handler = http.HandlerFunc(echo)
		c.listen = func() net.Listener { return duplicate(t, ln) }
		current := start(t, c)
		url := scheme + current.addr
		var stop atomic.Bool
		var busy sync.WaitGroup
		for range *hogs {
			busy.Go(func() {
				for !stop.Load() {
				}
			})
		}
		var served atomic.Int64
		for range 3 {
			transport := newTransport()
			defer transport.CloseIdleConnections()
			for i := range 12 {
				busy.Go(func() {
					for !stop.Load() {
						a, _, err := ask(t.Context(), transport, url, "body")
						if err != nil {
							t.Error(err)
							continue
						}
						a.is(t, "body")
						served.Add(1)
						if i%2 == 0 { // the others have their next request at once
							time.Sleep(rand.N(10 * time.Millisecond))
						}
					}
				})
			}
		}
		for range *drains {
			next := start(t, c)
			result := current.drain(t.Context())
			current.finished(result)
			current = next
		}
		stop.Store(true)
		busy.Wait()
		t.Logf("%d requests over %d drains", served.Load(), *drains)
	})
}
