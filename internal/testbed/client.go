//go:build linux

package main

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"

	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/testbed/wire"
)

// target is where the clients find the server.
type target struct {
	tcp, tls, h2c, unix, echo, udp string
	slowTCP, slowH2C               string // over slow links
	roots                          *x509.CertPool

	pace     time.Duration // mean pause between exchanges
	grace    time.Duration // the server's idle grace
	deadline time.Duration // of the clients whose requests have one
}

// kinds returns n clients of each kind.
func (t *target) kinds(n int) []load.Kind {
	plain := func(h load.HTTP, ask func(*rand.Rand) load.Request) func() load.Exchanger {
		if h.Addr == "" {
			h.Addr = t.tcp
		}
		h.Ask = ask
		return h.New
	}
	pause := load.UpTo(2 * t.pace)
	// Eight streams side by side on each connection.
	streams := func(name string, h load.HTTP, ask func(*rand.Rand) load.Request) load.Kind {
		return load.Kind{Name: name, Clients: n, Workers: 8, Pause: load.UpTo(8 * t.pace), New: plain(h, ask)}
	}
	overTLS := load.HTTP{Addr: t.tls, Roots: t.roots, Protocol: load.HTTP2}
	overTCP := load.HTTP{Addr: t.h2c, Protocol: load.H2C}
	replayable := func(h load.HTTP) load.HTTP { h.Replayable = true; return h }
	return []load.Kind{
		{Name: "new GET", Clients: n, Pause: pause, New: plain(load.HTTP{Fresh: true}, get)},
		{Name: "new POST", Clients: n, Pause: pause, New: plain(load.HTTP{Fresh: true}, post)},
		{Name: "keep-alive GET", Clients: n, Pause: pause, New: plain(load.HTTP{}, get)},
		{Name: "keep-alive POST", Clients: n, Pause: pause, New: plain(load.HTTP{}, post)},
		// Four times as many, because each of them sends so little.
		{Name: "thinking POST", Clients: 4 * n, Pause: think, New: plain(load.HTTP{}, post)},
		{Name: slow, Clients: n, Pause: pause, New: t.slowSender},
		{Name: "download", Clients: n, Pause: pause, New: plain(load.HTTP{}, download)},
		{Name: "TLS POST", Clients: n, Pause: pause, New: plain(load.HTTP{Addr: t.tls, Roots: t.roots, Renew: true}, post)},
		streams("HTTP/2 streams", replayable(overTLS), mixed),
		streams("HTTP/2 "+oneShot, overTLS, mixed),
		streams("h2c streams", replayable(overTCP), mixed),
		streams("h2c "+oneShot, overTCP, mixed),
		{Name: "Unix POST", Clients: n, Pause: pause, New: plain(load.HTTP{Addr: t.unix, Unix: true, Renew: true}, post)},
		{Name: "deadline POST", Clients: n, Pause: pause, New: plain(load.HTTP{Deadline: t.deadline}, hurried)},
		streams("deadline streams", replayable(load.HTTP{Addr: t.tls, Roots: t.roots, Protocol: load.HTTP2, Deadline: t.deadline}), hurried),
		{Name: slowLinked + " POST", Clients: n, Pause: pause, New: plain(load.HTTP{Addr: t.slowTCP}, post)},
		{Name: slowLinked + " download", Clients: n, Pause: pause, New: plain(load.HTTP{Addr: t.slowTCP}, download)},
		streams(slowLinked+" streams", replayable(load.HTTP{Addr: t.slowH2C, Protocol: load.H2C}), mixed),
		{Name: "gRPC calls", Clients: n, Workers: 8, Pause: load.UpTo(8 * t.pace), New: t.grpcCalls},
		{Name: "gRPC streams", Clients: n, Workers: 8, Pause: load.UpTo(8 * t.pace), New: t.grpcStreams},
		{Name: "TCP echo", Clients: n, Pause: pause, New: t.tcpEcho},
		{Name: "UDP", Clients: n, Pause: pause, New: t.datagrams},
	}
}

// slow is the name of the clients that send a request in pieces, and slowLinked begins the names
// of those behind a slow link.
const (
	slow       = "slow sender"
	slowLinked = "slow link"
)

// oneShot ends the names of the clients that send bodies over HTTP/2 which cannot be sent
// again.
const oneShot = "one-shot"

// slowLink is the way to the server of the clients that have a slow one.
var slowLink = load.Link{RoundTrip: 50 * time.Millisecond, Rate: 1 << 20}

// selected returns the kinds whose name contains one of the words, which are separated
// by commas; all of them if there are no words.
func selected(kinds []load.Kind, words string) []load.Kind {
	return slices.DeleteFunc(kinds, func(k load.Kind) bool {
		return !slices.ContainsFunc(strings.Split(words, ","), func(word string) bool { return strings.Contains(k.Name, word) })
	})
}

// think returns a pause of 1 ms to 5 s, each order of magnitude as often as the others.
func think(random *rand.Rand) time.Duration {
	pause := time.Millisecond
	for range random.IntN(4) {
		pause *= 10
	}
	return time.Duration((1 + 4*random.Float64()) * float64(pause))
}

func get(random *rand.Rand) load.Request {
	id, n := random.Uint64(), random.IntN(4<<10)
	return load.Request{Query: fmt.Sprintf("?id=%d&n=%d", id, n), Check: want(wire.Content(id, n))}
}

func post(random *rand.Rand) load.Request {
	content := wire.Content(random.Uint64(), 1+random.IntN(4<<10))
	return load.Request{Body: content, Sized: random.IntN(2) == 0, Check: want(content)}
}

// download lasts up to a second. Its latency is that of the response's head.
func download(random *rand.Rand) load.Request {
	id, n := random.Uint64(), 64<<10+random.IntN(1<<20)
	query := fmt.Sprintf("?id=%d&n=%d&pieces=20&gap=%dms", id, n, 10+random.IntN(40))
	return load.Request{Query: query, HeadOnly: true, Check: want(wire.Content(id, n))}
}

// hurried is answered at once, or after up to 25 ms, which is long before the deadline.
func hurried(random *rand.Rand) load.Request {
	if random.IntN(2) == 0 {
		return post(random)
	}
	id, n := random.Uint64(), 1+random.IntN(4<<10)
	query := fmt.Sprintf("?id=%d&n=%d&pieces=2&gap=%dms", id, n, random.IntN(25))
	return load.Request{Query: query, Check: want(wire.Content(id, n))}
}

func mixed(random *rand.Rand) load.Request {
	switch random.IntN(20) {
	case 0:
		return download(random)
	case 1, 2, 3, 4, 5:
		return get(random)
	default:
		return post(random)
	}
}

func want(content []byte) func(*http.Response, []byte) (int, error) {
	return func(resp *http.Response, got []byte) (int, error) { return check(resp, got, content) }
}

// check returns the version that has answered.
func check(resp *http.Response, got, want []byte) (version int, err error) {
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("status %s: %.60q", resp.Status, got)
	}
	if !bytes.Equal(got, want) {
		return 0, mismatch(got, want)
	}
	return wire.ParseVersion(resp.Header.Get(wire.VersionHeader))
}

// mismatch describes an answer that is not what was asked for.
func mismatch(got, want []byte) error {
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	return fmt.Errorf("content: %d bytes instead of %d, different from byte %d on", len(got), len(want), at)
}
