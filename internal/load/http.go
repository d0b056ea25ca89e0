package load

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync"
	"time"
)

// Limit is how long a client waits for an answer before it gives it up as lost.
const Limit = 20 * time.Second

// A Protocol is what an HTTP client speaks.
type Protocol int

const (
	HTTP1 Protocol = iota
	HTTP2          // over TLS
	H2C            // HTTP/2 without TLS
)

// HTTP is how a client uses net/http. Zero values are HTTP/1 over TCP without TLS, on a
// connection that is kept, with bodies that cannot be replayed.
type HTTP struct {
	Addr     string         // HOST:PORT, or the path of a Unix socket
	Unix     bool           // that it is one
	Roots    *x509.CertPool // for TLS, which is used if there are any
	Protocol Protocol

	Fresh bool // a new connection for each request
	Renew bool // a new connection for about every tenth request

	// Replayable lets net/http repeat a request with a body of which the server says,
	// by GOAWAY, that it has not processed it.
	Replayable bool

	Deadline time.Duration // of each request; Limit if zero

	Ask func(*rand.Rand) Request // the next request
}

// A Request is what a client asks, and what it wants to hear.
type Request struct {
	Query string
	Body  []byte // if not nil, the request is a POST
	Sized bool   // whether the request says how long the body is

	HeadOnly bool // whether the latency is that of the answer's head

	// Check checks the answer, and returns who has given it.
	Check func(answer *http.Response, body []byte) (by int, err error)
}

// New returns the Exchanger of one client, for a Kind.
func (h HTTP) New() Exchanger {
	transport := &http.Transport{DisableKeepAlives: h.Fresh, Protocols: new(http.Protocols)}
	transport.Protocols.SetHTTP1(h.Protocol == HTTP1)
	transport.Protocols.SetHTTP2(h.Protocol == HTTP2)
	transport.Protocols.SetUnencryptedHTTP2(h.Protocol == H2C)
	base := "http://" + h.Addr
	if h.Roots != nil {
		transport.TLSClientConfig = &tls.Config{RootCAs: h.Roots, ServerName: CertificateName}
		base = "https://" + h.Addr
	}
	if h.Unix {
		base = "http://unix"
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", h.Addr)
		}
	}
	c := &httpClient{HTTP: h, base: base, http: &http.Client{Transport: transport, Timeout: cmp.Or(h.Deadline, Limit)}}
	return c.exchange
}

// httpClient knows how long its connection has been idle.
type httpClient struct {
	HTTP
	base string
	http *http.Client

	mu   sync.Mutex
	last time.Time // end of the last exchange
}

func (c *httpClient) exchange(_ context.Context, w *Worker, began time.Time) {
	if c.Renew && w.Random.IntN(10) == 0 {
		c.http.CloseIdleConnections()
	}
	e := Exchange{Began: began}
	c.mu.Lock()
	if !c.Fresh && !c.last.IsZero() {
		e.Idle = time.Since(c.last)
	}
	c.mu.Unlock()
	// It may be one that was used less recently: net/http dials a spare connection if
	// a request comes before the last one's has been put back.
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		e.Idle = max(e.Idle, info.IdleTime)
		if !info.Reused {
			e.Opened++
		}
	}}
	e.By, e.Latency, e.Err = c.answer(httptrace.WithClientTrace(context.Background(), trace), c.Ask(w.Random), began)
	c.mu.Lock()
	c.last = time.Now()
	c.mu.Unlock()
	w.Record(e)
}

// request returns a request with a body of which net/http does not know what it is,
// unless it may repeat it.
func (c *httpClient) request(ctx context.Context, ask Request) (*http.Request, error) {
	if ask.Body == nil {
		return http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/"+ask.Query, nil)
	}
	var body io.Reader = bytes.NewReader(ask.Body)
	if !c.Replayable {
		body = struct{ io.Reader }{body}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+"/"+ask.Query, body)
	if err == nil && ask.Sized {
		req.ContentLength = int64(len(ask.Body))
	}
	return req, err
}

func (c *httpClient) answer(ctx context.Context, ask Request, began time.Time) (by int, latency time.Duration, err error) {
	req, err := c.request(ctx, ask)
	if err != nil {
		return 0, 0, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	latency = time.Since(began)
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, 0, fmt.Errorf("body: %w", err)
	}
	if !ask.HeadOnly {
		latency = time.Since(began)
	}
	by, err = ask.Check(resp, body)
	return by, latency, err
}
