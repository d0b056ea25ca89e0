package load

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// echo answers as wanted.
func echo(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) }

// post asks for its body.
func post(*rand.Rand) Request {
	return Request{Body: []byte("content"), Check: func(resp *http.Response, body []byte) (int, error) {
		if resp.StatusCode != http.StatusOK || string(body) != "content" {
			return 0, errors.New("wrong answer")
		}
		return 7, nil
	}}
}

// exchanges are those that were recorded.
type exchanges struct {
	sync.Mutex
	all []Exchange
}

func (x *exchanges) record(e Exchange) {
	x.Lock()
	defer x.Unlock()
	x.all = append(x.all, e)
}

func (x *exchanges) count() int {
	x.Lock()
	defer x.Unlock()
	return len(x.all)
}

// do has an HTTP client make one exchange.
func do(t *testing.T, exchange Exchanger) Exchange {
	t.Helper()
	var x exchanges
	exchange(t.Context(), &Worker{rand.New(rand.NewPCG(1, 1)), "kind", x.record}, time.Now())
	if len(x.all) != 1 {
		t.Fatalf("recorded %v, want one exchange", x.all)
	}
	return x.all[0]
}

// Net/http must not hide a loss by sending a body again, but where the kind says so.
func TestBodiesReplay(t *testing.T) {
	for _, sized := range []bool{false, true} {
		for _, replayable := range []bool{false, true} {
			c := &httpClient{HTTP: HTTP{Replayable: replayable}, base: "http://host"}
			req, err := c.request(t.Context(), Request{Body: []byte("content"), Sized: sized})
			if err != nil {
				t.Fatal(err)
			}
			if got := req.GetBody != nil; got != replayable {
				t.Errorf("replayable %t, sized %t: the body can be replayed: %t", replayable, sized, got)
			}
		}
	}
}

// A request that is lost on a kept connection is a failure of exactly one exchange, and
// the server gets it once.
func TestLostRequestIsNotRepeated(t *testing.T) {
	var requests atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1) == 2 {
			panic(http.ErrAbortHandler)
		}
		echo(w, r)
	}))
	defer server.Close()
	exchange := HTTP{Addr: server.Listener.Addr().String(), Ask: post}.New()
	first, lost, next := do(t, exchange), do(t, exchange), do(t, exchange)
	if first.Err != nil || lost.Err == nil || next.Err != nil {
		t.Errorf("got the errors %v, %v, %v; want the second alone", first.Err, lost.Err, next.Err)
	}
	if requests.Load() != 3 {
		t.Errorf("the server got %d requests, want 3", requests.Load())
	}
	if first.Idle != 0 || lost.Idle == 0 {
		t.Errorf("the connection was idle for %v and %v, want 0 and something", first.Idle, lost.Idle)
	}
}

// Each way to use net/http reaches the server as it says.
func TestHTTP(t *testing.T) {
	dir := t.TempDir()
	roots, err := WriteCertificate(dir)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := FreeAddresses(2)
	if err != nil || addrs[0] == addrs[1] {
		t.Fatalf("got the addresses %q, %v", addrs, err)
	}
	for _, test := range []struct {
		name        string
		http        HTTP
		protocol    string
		connections int
	}{
		{"kept", HTTP{}, "HTTP/1.1", 1},
		{"fresh", HTTP{Fresh: true}, "HTTP/1.1", 3},
		{"TLS", HTTP{Roots: roots}, "HTTP/1.1", 1},
		{"HTTP/2", HTTP{Roots: roots, Protocol: HTTP2}, "HTTP/2.0", 1},
		{"h2c", HTTP{Protocol: H2C}, "HTTP/2.0", 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			connections := make(map[string]bool)
			var x sync.Mutex
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				x.Lock()
				defer x.Unlock()
				connections[r.RemoteAddr] = true
				if r.Proto != test.protocol || (r.TLS != nil) != (test.http.Roots != nil) {
					t.Errorf("got %s, TLS %t", r.Proto, r.TLS != nil)
				}
				echo(w, r)
			}))
			server.Config.Protocols = new(http.Protocols)
			server.Config.Protocols.SetHTTP1(true)
			server.Config.Protocols.SetHTTP2(true)
			server.Config.Protocols.SetUnencryptedHTTP2(true)
			server.EnableHTTP2 = true
			if test.http.Roots != nil {
				server.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
				server.StartTLS()
			} else {
				server.Start()
			}
			defer server.Close()
			test.http.Addr, test.http.Ask = server.Listener.Addr().String(), post
			exchange := test.http.New()
			opened := 0
			for range 3 {
				e := do(t, exchange)
				if e.Err != nil || e.By != 7 || e.Kind != "kind" {
					t.Errorf("got %+v", e)
				}
				opened += e.Opened
			}
			if opened != test.connections {
				t.Errorf("counted %d connections that were opened, want %d", opened, test.connections)
			}
			if len(connections) != test.connections {
				t.Errorf("3 requests came on %d connections, want %d", len(connections), test.connections)
			}
		})
	}
}

// A Renew client sometimes opens a new connection, and a Unix client finds its socket.
func TestUnixRenew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var opened atomic.Int64
	server := &http.Server{Handler: http.HandlerFunc(echo), ConnState: func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			opened.Add(1)
		}
	}}
	go server.Serve(ln)
	defer server.Close()
	exchange := HTTP{Addr: path, Unix: true, Renew: true, Ask: post}.New()
	const requests = 200
	w := &Worker{rand.New(rand.NewPCG(1, 1)), "kind", func(e Exchange) {
		if e.Err != nil {
			t.Error(e.Err)
		}
	}}
	for range requests {
		exchange(t.Context(), w, time.Now())
	}
	if n := opened.Load(); n < requests/20 || n > requests/5 {
		t.Errorf("%d requests opened %d connections, want one for about every tenth", requests, n)
	}
}

// The latency is that of the whole answer or, if the kind says so, of its head.
func TestLatency(t *testing.T) {
	var hold time.Duration // of the body, after the head
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		content, _ := io.ReadAll(r.Body)
		w.(http.Flusher).Flush()
		time.Sleep(hold) // what is measured
		w.Write(content)
	}))
	defer server.Close()
	latency := func(headOnly bool) time.Duration {
		e := do(t, HTTP{Addr: server.Listener.Addr().String(), Ask: func(random *rand.Rand) Request {
			ask := post(random)
			ask.HeadOnly = headOnly
			return ask
		}}.New())
		if e.Err != nil || e.Ended.Sub(e.Began) < hold {
			t.Fatalf("got %+v", e)
		}
		return e.Latency
	}

	hold = 20 * time.Millisecond
	if got := latency(false); got < hold {
		t.Errorf("the latency is %v, and the body was held for %v", got, hold)
	}
	// However busy the machine is, a head comes before the body if that is held for long enough.
	for latency(true) >= hold {
		if hold *= 2; hold > time.Minute {
			t.Fatal("the latency of a head is that of the body")
		}
	}
}

// A scheduled exchange that is late because of the one before it began when it was due,
// and is not left out.
func TestSlownessIsNotOmitted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const stall, every = 200 * time.Millisecond, 10 * time.Millisecond
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		var x exchanges
		n := 0
		l := Start(ctx, []Kind{{
			Name: "kind", Clients: 1, Schedule: true, Pause: func(*rand.Rand) time.Duration { return every },
			New: func() Exchanger {
				return func(_ context.Context, w *Worker, began time.Time) {
					if n++; n == 5 {
						time.Sleep(stall) // in the bubble's time
					}
					w.Record(Exchange{Began: began, Latency: time.Since(began)})
				}
			},
		}}, 1, x.record)
		l.Wait()
		slow := 0
		for _, e := range x.all {
			if e.Latency > stall/4 {
				slow++
			}
		}
		// The one that stalled, and of the 20 that were due then, three quarters.
		if slow < 15 || slow > 16 {
			t.Errorf("%d exchanges were slow, want those that were due during the stall", slow)
		}
		if len(x.all) < 50 {
			t.Errorf("%d exchanges in half a second, want one every %v", len(x.all), every)
		}
	})
}

// Clients end with what they have begun, not in the middle of it.
func TestExchangesAreFinished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var x exchanges
		begun := 0
		l := Start(ctx, []Kind{{Name: "kind", Clients: 1, Workers: 3, Pause: UpTo(time.Second), New: func() Exchanger {
			var mu sync.Mutex
			return func(_ context.Context, w *Worker, began time.Time) {
				mu.Lock()
				begun++
				mu.Unlock()
				time.Sleep(time.Second) // in the bubble's time
				w.Record(Exchange{Began: began})
			}
		}}}, 1, x.record)
		l.AwaitFirst()
		if n := x.count(); n != 3 {
			t.Errorf("%d exchanges, want the first of each of 3 workers", n)
		}
		time.Sleep(10 * time.Second) // in the bubble's time
		cancel()
		l.Wait()
		if len(x.all) != begun || begun < 6 {
			t.Errorf("%d exchanges were begun, %d recorded", begun, len(x.all))
		}
	})
}

// The files are those that servers want: the third holds both others.
func TestCertificateFiles(t *testing.T) {
	dir := t.TempDir()
	if _, err := WriteCertificate(dir); err != nil {
		t.Fatal(err)
	}
	read := func(name string) []byte {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	if !bytes.Equal(read(BothFile), append(read(CertFile), read(KeyFile)...)) {
		t.Errorf("%s is not %s and %s", BothFile, CertFile, KeyFile)
	}
}

// A client with a spare connection may have been busy on another while that was idle.
func TestIdleOfSpareConnection(t *testing.T) {
	arrived, release := make(chan bool), make(chan bool)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Has("hold") {
			arrived <- true
			<-release
		}
	}))
	defer server.Close()
	query := "?hold"
	h := HTTP{Addr: server.Listener.Addr().String(), Ask: func(*rand.Rand) Request {
		return Request{Query: query, Check: func(*http.Response, []byte) (int, error) { return 0, nil }}
	}}
	exchange := h.New()
	var all sync.WaitGroup
	hold := func(n int) {
		for range n {
			all.Go(func() { do(t, exchange) })
		}
		for range n {
			<-arrived
		}
	}

	hold(2) // so that there are two connections
	release <- true
	release <- true
	all.Wait()
	began := time.Now()
	hold(1)
	time.Sleep(50 * time.Millisecond) // what is measured
	release <- true
	all.Wait()
	busy := time.Since(began)
	hold(1)
	query = "?"
	if got := do(t, exchange).Idle; got < busy {
		t.Errorf("the spare connection was idle for %v, want at least %v", got, busy)
	}
	release <- true
	all.Wait()
}

// A client with a deadline fails when that has passed, and the others do not.
func TestDeadline(t *testing.T) {
	release := make(chan bool)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-release:
			echo(w, r)
		}
	}))
	defer server.Close()
	h := HTTP{Addr: server.Listener.Addr().String(), Ask: post, Deadline: time.Millisecond}
	if e := do(t, h.New()); !errors.Is(e.Err, context.DeadlineExceeded) {
		t.Errorf("got %v, want %v", e.Err, context.DeadlineExceeded)
	}
	h.Deadline = 0
	close(release)
	if e := do(t, h.New()); e.Err != nil {
		t.Error(e.Err)
	}
}

// A link takes its time in both directions, keeps the order, and ends as its ends do.
func TestLink(t *testing.T) {
	const roundTrip, rate = 50 * time.Millisecond, 1 << 20
	content := bytes.Repeat([]byte("content "), rate/8/8) // an eighth of a second each way
	for _, link := range []Link{{RoundTrip: roundTrip}, {Rate: rate}} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			w.Write(body)
		}))
		near, err := link.Listen(t.Context(), server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		exchange := HTTP{Addr: near, Ask: func(*rand.Rand) Request {
			return Request{Body: content, Check: func(_ *http.Response, body []byte) (int, error) {
				if !bytes.Equal(body, content) {
					return 0, errors.New("wrong answer")
				}
				return 0, nil
			}}
		}}.New()
		least := roundTrip
		if link.Rate > 0 {
			least = time.Second / 4
		}
		for range 3 {
			if e := do(t, exchange); e.Err != nil || e.Latency < least {
				t.Errorf("%+v: got %v after %v, want at least %v", link, e.Err, e.Latency, least)
			}
		}
		server.Close()
		if e := do(t, exchange); e.Err == nil {
			t.Errorf("%+v: answered without a server", link)
		}
	}
}

// The end of its context cuts what a link carries.
func TestLinkIsCut(t *testing.T) {
	arrived := make(chan bool)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		arrived <- true
		<-r.Context().Done()
	}))
	defer server.Close()
	ctx, cut := context.WithCancel(t.Context())
	near, err := Link{}.Listen(ctx, server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		<-arrived
		cut()
	}()
	exchange := HTTP{Addr: near, Ask: func(*rand.Rand) Request { return Request{} }}.New()
	for range 2 {
		if e := do(t, exchange); e.Err == nil || errors.Is(e.Err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the connection's end", e.Err)
		}
	}
}
