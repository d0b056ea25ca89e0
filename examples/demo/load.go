package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// This file owns the clients. They know nothing of upgrades: what a failure had
// to do with one is found out afterwards, by its time.

const (
	// answerBound is how long an answer may take.
	answerBound = 10 * time.Second

	// pauseBound is the longest pause between two requests of a client. Pauses
	// differ so that the server gets requests in every state of its connections.
	pauseBound = 2 * time.Millisecond
)

// A load is a number of clients at work.
type load struct {
	served, failed atomic.Int64 // so far

	url      string
	stopping chan struct{}
	running  sync.WaitGroup
	clients  []*client
}

// A tally is what the clients have seen.
type tally struct {
	served   map[identity]int
	failures []failure
}

// A failure is a request that was not answered as it should have been.
type failure struct {
	client       string
	reason       string
	began, ended time.Time
	reused       bool     // whether an earlier request was answered on the connection
	previous     identity // by whom, if reused
}

func startLoad(url string, clients int) *load {
	l := &load{url: url, stopping: make(chan struct{})}
	for n := range clients {
		c := newConnectionClient()
		if n%2 == 1 {
			c = keepAliveClient()
		}
		c.served = map[identity]int{}
		l.clients = append(l.clients, c)
		l.running.Go(func() { l.send(c) })
	}
	return l
}

// stop returns once the requests under way have ended.
func (l *load) stop() tally {
	close(l.stopping)
	l.running.Wait()
	total := tally{served: map[identity]int{}}
	for _, c := range l.clients {
		for who, n := range c.served {
			total.served[who] += n
		}
		total.failures = append(total.failures, c.failures...)
	}
	return total
}

func (l *load) send(c *client) {
	defer c.transport.CloseIdleConnections()
	for {
		if c.try(l.url) {
			l.served.Add(1)
		} else {
			l.failed.Add(1)
		}
		select {
		case <-l.stopping:
			return
		case <-time.After(rand.N(pauseBound)):
		}
	}
}

// A client sends one request after the other.
type client struct {
	name      string
	method    string
	body      string
	transport *http.Transport

	previous identity
	served   map[identity]int
	failures []failure
}

func newConnectionClient() *client {
	return &client{
		name:      "GET on a new connection",
		method:    http.MethodGet,
		transport: &http.Transport{DisableKeepAlives: true},
	}
}

// keepAliveClient sends what net/http does not send again by itself: it repeats a
// GET if a connection that was in use before breaks, and nobody notices the loss.
func keepAliveClient() *client {
	return &client{
		name:      "POST with keep-alive",
		method:    http.MethodPost,
		body:      "not to be sent twice",
		transport: &http.Transport{},
	}
}

// try sends one request and reports whether it was answered.
func (c *client) try(url string) bool {
	var reused atomic.Bool
	ctx, cancel := context.WithTimeout(context.Background(), answerBound)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(conn httptrace.GotConnInfo) { reused.Store(conn.Reused) },
	})

	began := time.Now()
	who, err := c.exchange(ctx, url)
	if err != nil {
		c.failures = append(c.failures, failure{
			client:   c.name,
			reason:   describe(err),
			began:    began,
			ended:    time.Now(),
			reused:   reused.Load(),
			previous: c.previous,
		})
		return false
	}
	c.served[who]++
	c.previous = who
	return true
}

func (c *client) exchange(ctx context.Context, url string) (identity, error) {
	request, err := http.NewRequestWithContext(ctx, c.method, url, nil)
	if err != nil {
		return identity{}, err
	}
	if c.body != "" {
		// Not by NewRequest, which would set GetBody: then net/http could repeat the request.
		request.Body = io.NopCloser(strings.NewReader(c.body))
		request.ContentLength = int64(len(c.body))
	}
	// Not http.Client, which would follow redirects.
	response, err := c.transport.RoundTrip(request)
	if err != nil {
		return identity{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1024))
	if err != nil {
		return identity{}, fmt.Errorf("in the body: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		return identity{}, fmt.Errorf("status %d", response.StatusCode)
	}
	return parseAnswer(string(body))
}

var answer = regexp.MustCompile(`^version=(\S+) pid=([1-9][0-9]*)\n$`)

func parseAnswer(body string) (identity, error) {
	match := answer.FindStringSubmatch(body)
	if match == nil {
		return identity{}, fmt.Errorf("the answer was %q", body)
	}
	pid, err := strconv.Atoi(match[2])
	return identity{match[1], pid}, err
}

// describe leaves the addresses out, which differ, so that reasons can be counted.
func describe(err error) string {
	var op *net.OpError
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Sprintf("no answer in %v", answerBound)
	case errors.As(err, &op):
		return op.Err.Error()
	default:
		return err.Error()
	}
}
