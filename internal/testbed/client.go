//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"
)

// exchangeLimit is how long a client waits for an answer before it gives it up
// as lost.
const exchangeLimit = 20 * time.Second

// client is one worker of some kind. Its kind's loop makes exchanges until ctx is
// done, and never gives one up because of that.
type client struct {
	kind   string
	random *rand.Rand
	target *target
	record *recorder
	pace   time.Duration // mean pause between exchanges
	grace  time.Duration // the server's idle grace
}

// target is where the clients find the server.
type target struct {
	tcp, tls, h2c, unix, echo, udp string
	roots                          []byte // PEM
}

// loops is what the clients of each kind do.
var loops = []struct {
	kind string
	loop func(context.Context, *client)
}{
	{"new GET", newGET},
	{"new POST", newPOST},
	{"keep-alive GET", keepGET},
	{"keep-alive POST", keepPOST},
	{"thinking POST", thinkingPOST},
	{"slow sender", slowSender},
	{"download", download},
	{"TLS POST", tlsPOST},
	{"HTTP/2 streams", http2Streams},
	{"HTTP/2 one-shot", http2OneShot},
	{"h2c streams", h2cStreams},
	{"h2c one-shot", h2cOneShot},
	{"Unix POST", unixPOST},
	{"TCP echo", tcpEcho},
	{"UDP", udp},
}

// matches reports whether the kind contains one of the words, which are separated
// by commas.
func matches(kind, words string) bool {
	return words != "" && slices.ContainsFunc(strings.Split(words, ","), func(word string) bool {
		return strings.Contains(kind, word)
	})
}

// runClients runs n clients of each kind that is selected until ctx is done and each has finished
// what it had begun.
func runClients(ctx context.Context, n int, only string, seed uint64, like client) {
	var wait sync.WaitGroup
	for i, l := range loops {
		if only != "" && !matches(l.kind, only) {
			continue
		}
		for j := range n {
			c := like
			c.kind = l.kind
			c.random = rand.New(rand.NewPCG(seed, uint64(1+i*n+j)))
			wait.Go(func() { l.loop(ctx, &c) })
		}
	}
	wait.Wait()
}

// rest pauses between exchanges. It reports false if there is to be no other.
func (c *client) rest(ctx context.Context) bool {
	return sleep(ctx, time.Duration(c.random.Float64()*2*float64(c.pace)))
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// mismatch describes an answer that is not what was asked for.
func mismatch(got, want []byte) error {
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	return fmt.Errorf("content: %d bytes instead of %d, different from byte %d on", len(got), len(want), at)
}
