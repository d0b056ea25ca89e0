package httpdrain_test

import (
	"context"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/tableflip/internal/load"
)

// Clients whose requests have deadlines lose none to a drain that they would not have
// lost without it, however long the round trip is, if they can repeat their bodies.
// The clock of this test stands still while anybody computes, so that nothing but the
// Drainer can make a request late.
func TestDeadlinesOverHTTP2(t *testing.T) {
	const deadline, drains = 200 * time.Millisecond, 5
	testCertificate()
	for _, rtt := range []time.Duration{0, 2 * time.Millisecond, 50 * time.Millisecond, 150 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			c := config{
				handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					limit := deadline - rtt - 2*time.Millisecond
					switch rand.N(3) {
					case 0:
						pass(rand.N(limit))
					case 1:
						pass(limit - rand.N(15*time.Millisecond))
					}
					echo(w, r)
				}),
				bubble: true,
				server: func(s *http.Server) {
					s.Protocols.SetUnencryptedHTTP2(true)
					s.WriteTimeout = time.Second
				},
			}
			var current atomic.Pointer[memory]
			next := func() *service {
				m := newMemory()
				c.listen = func() net.Listener { return m }
				s := start(t, c)
				current.Store(m)
				return s
			}
			s := next()
			var served, failed atomic.Int64
			var stop atomic.Bool
			var clients sync.WaitGroup
			var transports []*http.Transport
			for range 3 {
				transport := plainHTTP2Transport()
				transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
					nc, err := current.Load().dial()
					if err != nil {
						return nil, err
					}
					return load.Link{RoundTrip: rtt}.Over(nc), nil
				}
				transports = append(transports, transport)
				for range 20 {
					clients.Go(func() {
						client := &http.Client{Transport: transport, Timeout: deadline}
						request := throughClient(client, "http://example.com")
						for !stop.Load() {
							if err := request("POST", "body"); err != nil {
								failed.Add(1)
								t.Log(err)
							}
							served.Add(1)
						}
					})
				}
			}
			pass(500 * time.Millisecond)
			for range drains {
				last := s
				s = next()
				last.finishedInBubble(last.drain(t.Context()))
				pass(500 * time.Millisecond)
			}
			stop.Store(true)
			clients.Wait()
			t.Logf("round trip %v: %d requests, %d failed", rtt, served.Load(), failed.Load())
			if failed.Load() > 0 {
				t.Errorf("round trip %v: %d of %d requests failed", rtt, failed.Load(), served.Load())
			}
			for _, transport := range transports {
				transport.CloseIdleConnections()
			}
			pass(time.Second) // for what is on the link
			s.finishedInBubble(s.drain(t.Context()))
		})
	}
}
