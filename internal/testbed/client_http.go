//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"

	"example.com/tableflip/internal/testbed/wire"
)

// httpClient makes exchanges by net/http, and knows how long its connection has
// been idle.
type httpClient struct {
	*client
	http *http.Client
	base string

	fresh bool // connections are not reused
	// replayable lets net/http repeat a POST that the server says, by GOAWAY, that
	// it has not processed.
	replayable bool

	mu   sync.Mutex
	last time.Time // end of the last exchange
}

func (c *client) http1(addr string, transport *http.Transport) *httpClient {
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP1(true)
	return c.overHTTP("http://"+addr, transport)
}

func (c *client) overHTTP(base string, transport *http.Transport) *httpClient {
	return &httpClient{client: c, base: base, fresh: transport.DisableKeepAlives, http: &http.Client{Transport: transport, Timeout: exchangeLimit}}
}

func (c *client) tlsConfig() *tls.Config {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.target.roots)
	return &tls.Config{RootCAs: roots, ServerName: certificateName}
}

func newGET(ctx context.Context, c *client) {
	h := c.http1(c.target.tcp, &http.Transport{DisableKeepAlives: true})
	for c.rest(ctx) {
		h.get(c.random)
	}
}

func newPOST(ctx context.Context, c *client) {
	h := c.http1(c.target.tcp, &http.Transport{DisableKeepAlives: true})
	for c.rest(ctx) {
		h.post(c.random)
	}
}

func keepGET(ctx context.Context, c *client) {
	h := c.http1(c.target.tcp, &http.Transport{})
	for c.rest(ctx) {
		h.get(c.random)
	}
}

func keepPOST(ctx context.Context, c *client) {
	h := c.http1(c.target.tcp, &http.Transport{})
	for c.rest(ctx) {
		h.post(c.random)
	}
}

// thinkingPOST pauses for 1 ms to 5 s, each order of magnitude as often as the
// others.
func thinkingPOST(ctx context.Context, c *client) {
	var wait sync.WaitGroup
	defer wait.Wait()
	for range 4 { // as each of them sends so little
		random := rand.New(rand.NewPCG(c.random.Uint64(), 0))
		wait.Go(func() {
			h := c.http1(c.target.tcp, &http.Transport{})
			for {
				think := time.Millisecond
				for range random.IntN(4) {
					think *= 10
				}
				if !sleep(ctx, time.Duration((1+4*random.Float64())*float64(think))) {
					return
				}
				h.post(random)
			}
		})
	}
}

func download(ctx context.Context, c *client) {
	h := c.http1(c.target.tcp, &http.Transport{})
	for c.rest(ctx) {
		h.download(c.random)
	}
}

// tlsPOST makes a new connection for about every tenth request.
func tlsPOST(ctx context.Context, c *client) {
	h := c.http1(c.target.tls, &http.Transport{TLSClientConfig: c.tlsConfig()})
	h.base = "https://" + c.target.tls
	for c.rest(ctx) {
		if c.random.IntN(10) == 0 {
			h.http.CloseIdleConnections()
		}
		h.post(c.random)
	}
}

func unixPOST(ctx context.Context, c *client) {
	h := c.http1("unix", &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", c.target.unix)
	}})
	for c.rest(ctx) {
		if c.random.IntN(10) == 0 {
			h.http.CloseIdleConnections()
		}
		h.post(c.random)
	}
}

func http2Streams(ctx context.Context, c *client) { c.streams(ctx, c.http2(), true) }
func http2OneShot(ctx context.Context, c *client) { c.streams(ctx, c.http2(), false) }
func h2cStreams(ctx context.Context, c *client)   { c.streams(ctx, c.h2c(), true) }
func h2cOneShot(ctx context.Context, c *client)   { c.streams(ctx, c.h2c(), false) }

func (c *client) http2() *httpClient {
	transport := &http.Transport{TLSClientConfig: c.tlsConfig(), Protocols: new(http.Protocols)}
	transport.Protocols.SetHTTP2(true)
	return c.overHTTP("https://"+c.target.tls, transport)
}

func (c *client) h2c() *httpClient {
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	return c.overHTTP("http://"+c.target.h2c, transport)
}

// streams makes exchanges side by side on one connection.
func (c *client) streams(ctx context.Context, h *httpClient, replayable bool) {
	h.replayable = replayable
	var wait sync.WaitGroup
	for range 8 {
		random := rand.New(rand.NewPCG(c.random.Uint64(), 0))
		wait.Go(func() {
			for sleep(ctx, time.Duration(random.Float64()*8*float64(c.pace))) {
				switch random.IntN(20) {
				case 0:
					h.download(random)
				case 1, 2, 3, 4, 5:
					h.get(random)
				default:
					h.post(random)
				}
			}
		})
	}
	wait.Wait()
}

func (h *httpClient) get(random *rand.Rand) {
	id, n := random.Uint64(), random.IntN(4<<10)
	req, _ := http.NewRequest("GET", fmt.Sprintf("%s/?id=%d&n=%d", h.base, id, n), nil)
	h.exchange(req, wire.Content(id, n), false)
}

// post sends a body that cannot be replayed, unless the client says otherwise:
// net/http must not repeat the request once it has sent some of it.
func (h *httpClient) post(random *rand.Rand) {
	content := wire.Content(random.Uint64(), 1+random.IntN(4<<10))
	var body io.Reader = bytes.NewReader(content)
	if !h.replayable {
		body = struct{ io.Reader }{body}
	}
	req, _ := http.NewRequest("POST", h.base, body)
	if random.IntN(2) == 0 {
		req.ContentLength = int64(len(content))
	}
	h.exchange(req, content, false)
}

// download lasts up to a second. Its latency is that of the response's head.
func (h *httpClient) download(random *rand.Rand) {
	id, n := random.Uint64(), 64<<10+random.IntN(1<<20)
	req, _ := http.NewRequest("GET", fmt.Sprintf("%s/?id=%d&n=%d&pieces=20&gap=%dms", h.base, id, n, 10+random.IntN(40)), nil)
	h.exchange(req, wire.Content(id, n), true)
}

func (h *httpClient) exchange(req *http.Request, want []byte, headOnly bool) {
	began := time.Now()
	h.mu.Lock()
	idle := time.Duration(0)
	if !h.fresh && !h.last.IsZero() {
		idle = began.Sub(h.last)
	}
	h.mu.Unlock()
	o := outcome{kind: h.kind, suspect: began}
	// The request must arrive before the grace is over, not only be sent.
	if idle > h.grace*8/10 {
		o.unpromised = fmt.Sprintf("idle for %.1f graces", float64(idle)/float64(h.grace))
	}
	o.version, o.latency, o.err = h.answer(req, want, headOnly)
	h.mu.Lock()
	h.last = time.Now()
	h.mu.Unlock()
	h.record.add(o)
}

func (h *httpClient) answer(req *http.Request, want []byte, headOnly bool) (version int, latency time.Duration, err error) {
	began := time.Now()
	resp, err := h.http.Do(req)
	if err != nil {
		return 0, 0, err
	}
	latency = time.Since(began)
	got, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil {
		return 0, 0, fmt.Errorf("body: %w", err)
	}
	if !headOnly {
		latency = time.Since(began)
	}
	version, err = check(resp, got, want)
	return version, latency, err
}

func check(resp *http.Response, got, want []byte) (version int, err error) {
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("status %s: %.60q", resp.Status, got)
	}
	if !bytes.Equal(got, want) {
		return 0, mismatch(got, want)
	}
	return wire.ParseVersion(resp.Header.Get(wire.VersionHeader))
}
