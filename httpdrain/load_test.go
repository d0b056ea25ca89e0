package httpdrain_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/tableflip/httpdrain"
)

// How the load is to be made by hand, to see what others lose:
//
//	go test -run Handover -handovers=50 -drain=shutdown
var (
	handovers    = flag.Int("handovers", 5, "how many handovers the load test makes")
	drainBy      = flag.String("drain", "httpdrain", "how the load test drains: httpdrain, shutdown (http.Server.Shutdown alone), or keepalives (after SetKeepAlivesEnabled(false))")
	pause        = flag.Duration("pause", 0, "the longest pause of a client between two requests")
	only         = flag.String("kinds", ".", "a regular expression for the kinds of clients that make the load")
	unrepeatable = flag.Bool("unrepeatable", false, "whether bodies over HTTP/2 cannot be replayed")
	loadGrace    = flag.Duration("grace", patience, "IdleGrace in the load test")
)

// A kind is a client that repeats one request, and fails if that fails.
type kind struct {
	name    string
	workers int
	// dial returns what makes one request, and whether it succeeded.
	client func(addrs addresses) func(method string, body string) error
}

type addresses struct{ plain, both, encrypted string }

// once returns a client with a new connection for each request.
func once(dial func() (net.Conn, error)) func(string, string) error {
	return func(method, body string) error {
		nc, err := dial()
		if err != nil {
			return err
		}
		defer nc.Close()
		_, err = exchange(nc, bufio.NewReader(nc), method, body)
		return err
	}
}

// keepAlive returns a client that uses its connection until the server says
// that it will close it. It never repeats a request.
func keepAlive(dial func() (net.Conn, error)) func(string, string) error {
	var nc net.Conn
	var r *bufio.Reader
	return func(method, body string) error {
		if nc != nil && *pause > 0 {
			// As a client does that waits for its connections' end while they are idle.
			nc.SetReadDeadline(time.Now().Add(time.Millisecond))
			if _, err := r.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
				nc.Close()
				nc = nil
			}
		}
		if nc == nil {
			var err error
			if nc, err = dial(); err != nil {
				return err
			}
			r = bufio.NewReader(nc)
		}
		last, err := exchange(nc, r, method, body)
		if err != nil || last {
			nc.Close()
			nc = nil
		}
		return err
	}
}

// exchange makes one request on nc.
func exchange(nc net.Conn, r *bufio.Reader, method, body string) (last bool, err error) {
	nc.SetDeadline(time.Now().Add(patience))
	var request bytes.Buffer
	fmt.Fprintf(&request, "%s /echo HTTP/1.1\r\nHost: example.com\r\n", method)
	if body != "" {
		fmt.Fprintf(&request, "Content-Length: %d\r\n", len(body))
	}
	request.WriteString("\r\n" + body)
	if _, err := nc.Write(request.Bytes()); err != nil {
		return false, err
	}
	response, err := http.ReadResponse(r, nil)
	if err != nil {
		return false, err
	}
	return response.Close, check(response, body)
}

func check(response *http.Response, body string) error {
	defer response.Body.Close()
	got, err := io.ReadAll(response.Body)
	if err != nil {
		return fmt.Errorf("reading the response: %w", err)
	}
	if response.StatusCode != http.StatusOK || string(got) != body {
		return fmt.Errorf("status %d, %d bytes of %d", response.StatusCode, len(got), len(body))
	}
	return nil
}

// echo answers with the request's body.
func echo(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) }

// throughTransport returns a client of net/http. Bodies over HTTP/2 can be
// replayed, unless a flag says otherwise: RFC 9113 relies on that in section 6.8.
func throughTransport(transport *http.Transport, url string) func(string, string) error {
	return throughClient(&http.Client{Transport: transport, Timeout: patience}, url)
}

func throughClient(client *http.Client, url string) func(string, string) error {
	return func(method, body string) error {
		request, err := http.NewRequest(method, url+"/echo", strings.NewReader(body))
		if err != nil {
			return err
		}
		if *unrepeatable && body != "" {
			request.Body, request.GetBody = io.NopCloser(request.Body), nil
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		return check(response, body)
	}
}

func tcp(addr string) func() (net.Conn, error) {
	return func() (net.Conn, error) { return net.Dial("tcp", addr) }
}

func overTLS(addr string) func() (net.Conn, error) {
	return func() (net.Conn, error) { return tls.Dial("tcp", addr, clientTLS("http/1.1")) }
}

// shared returns a client whose workers share one Transport, and so a connection.
func shared(transport func() *http.Transport, url func(addresses) string) func(addresses) func(string, string) error {
	t := transport()
	return func(a addresses) func(string, string) error { return throughTransport(t, url(a)) }
}

func http2Transport() *http.Transport {
	t := &http.Transport{TLSClientConfig: clientTLS(), Protocols: new(http.Protocols)}
	t.Protocols.SetHTTP2(true)
	return t
}

func plainHTTP2Transport() *http.Transport {
	t := &http.Transport{Protocols: new(http.Protocols)}
	t.Protocols.SetUnencryptedHTTP2(true)
	return t
}

func kinds() []kind {
	return []kind{
		{"new connection", 2, func(a addresses) func(string, string) error { return once(tcp(a.plain)) }},
		{"keep-alive", 3, func(a addresses) func(string, string) error { return keepAlive(tcp(a.plain)) }},
		{"keep-alive beside h2c", 2, func(a addresses) func(string, string) error { return keepAlive(tcp(a.both)) }},
		{"TLS, new connection", 1, func(a addresses) func(string, string) error { return once(overTLS(a.encrypted)) }},
		{"TLS, keep-alive", 2, func(a addresses) func(string, string) error { return keepAlive(overTLS(a.encrypted)) }},
		{"HTTP/2", 4, shared(http2Transport, func(a addresses) string { return "https://" + a.encrypted })},
		{"h2c", 4, shared(plainHTTP2Transport, func(a addresses) string { return "http://" + a.both })},
	}
}

// generation is what one process would be: three servers.
type generation struct {
	servers [3]*http.Server
	drains  [3]*httpdrain.Drainer
}

// startGeneration serves on duplicates of the listeners, as after an upgrade.
func startGeneration(t *testing.T, base [3]*net.TCPListener) *generation {
	g := new(generation)
	for i, ln := range base {
		dup := duplicate(t, ln)
		srv := &http.Server{
			Handler:   http.HandlerFunc(echo),
			ErrorLog:  log.New(io.Discard, "", 0),
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate()}},
			Protocols: new(http.Protocols),
		}
		srv.Protocols.SetHTTP1(true)
		srv.Protocols.SetHTTP2(true)
		srv.Protocols.SetUnencryptedHTTP2(i == 1)
		g.servers[i] = srv
		serve, serveTLS := srv.Serve, srv.ServeTLS
		if *drainBy == "httpdrain" {
			d := httpdrain.New(srv)
			d.IdleGrace = *loadGrace
			g.drains[i] = d
			serve, serveTLS = d.Serve, d.ServeTLS
		}
		go func() {
			var err error
			if i == 2 {
				err = serveTLS(dup, "", "")
			} else {
				err = serve(dup)
			}
			if err != http.ErrServerClosed {
				t.Errorf("Serve: %v", err)
			}
		}()
	}
	return g
}

func (g *generation) drain(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var wg sync.WaitGroup
	for i, srv := range g.servers {
		wg.Go(func() {
			var err error
			switch *drainBy {
			case "httpdrain":
				err = g.drains[i].Shutdown(ctx)
			case "keepalives":
				srv.SetKeepAlivesEnabled(false)
				fallthrough
			case "shutdown":
				err = srv.Shutdown(ctx)
			}
			if err != nil {
				t.Errorf("draining: %v", err)
			}
		})
	}
	wg.Wait()
}

// Every client of a service that is replaced again and again gets its answers.
func TestHandoverUnderLoad(t *testing.T) {
	var base [3]*net.TCPListener
	for i := range base {
		base[i] = listenTCP(t).(*net.TCPListener)
		defer base[i].Close()
	}
	addrs := addresses{base[0].Addr().String(), base[1].Addr().String(), base[2].Addr().String()}
	current := startGeneration(t, base)
	type tally struct{ requests, failures atomic.Int64 }
	tallies := make(map[string]*tally)
	var order []string
	var stop atomic.Bool
	var clients sync.WaitGroup
	wanted := regexp.MustCompile(*only)
	for _, k := range kinds() {
		if !wanted.MatchString(k.name) {
			continue
		}
		for _, method := range []string{"GET", "POST"} {
			name := k.name + " " + method
			counts := new(tally)
			tallies[name] = counts
			order = append(order, name)
			body := ""
			if method == "POST" {
				body = "a body that cannot be replayed"
			}
			for range k.workers {
				request := k.client(addrs)
				clients.Go(func() {
					for !stop.Load() {
						if err := request(method, body); err != nil {
							if counts.failures.Add(1) < 4 {
								t.Logf("%s: %v", name, err)
							}
						}
						counts.requests.Add(1)
						if *pause > 0 {
							<-time.After(rand.N(*pause))
						}
					}
				})
			}
		}
	}
	for range *handovers {
		next := startGeneration(t, base)
		current.drain(t)
		current = next
	}
	stop.Store(true)
	clients.Wait()
	for _, d := range current.drains {
		if d != nil {
			d.IdleGrace = -1 // the clients have no more requests
		}
	}
	current.drain(t)
	for _, name := range order {
		counts := tallies[name]
		t.Logf("%-30s %7d requests %5d failed", name, counts.requests.Load(), counts.failures.Load())
		if counts.failures.Load() > 0 && *drainBy == "httpdrain" {
			t.Errorf("%s: %d requests failed", name, counts.failures.Load())
		}
	}
}
