//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file is the clients, which are the same for all peers, and what they see.

// A kind is one way to be a client.
type kind struct {
	name    string
	clients int
	post    bool
	fresh   bool // a new connection for each request, or for every tenth with TLS
	tls     bool
	http2   bool // one connection for all clients of the kind
	pause   func() time.Duration
	// schedule makes a request due at fixed times, and has its latency begin then:
	// what a slow answer delays counts as slow, too.
	schedule bool
}

const http2 = "HTTP/2"

// kinds are the clients that upgrades are made under: 16 in all.
var kinds = []kind{
	{name: "new GET", clients: 2, fresh: true, pause: upTo(10)},
	{name: "new POST", clients: 2, fresh: true, post: true, pause: upTo(10)},
	{name: "keep-alive GET", clients: 2, pause: upTo(10)},
	{name: "keep-alive POST", clients: 2, post: true, pause: upTo(10)},
	// Well below the idle grace of a second, up to which httpdrain promises something.
	{name: "thinking POST", clients: 4, post: true, pause: func() time.Duration { return 100*time.Millisecond + upTo(500)() }},
	{name: "TLS POST", clients: 2, post: true, fresh: true, tls: true, pause: upTo(10)},
	{name: http2, clients: 2, post: true, tls: true, http2: true, pause: upTo(10)},
}

// steadyKinds are the clients by which latency is measured. The idle grace of the
// servers is shorter then.
var steadyKinds = []kind{
	{name: "new GET", clients: 2, fresh: true, schedule: true, pause: every(10)},
	{name: "keep-alive GET", clients: 4, schedule: true, pause: every(10)},
}

func upTo(milliseconds float64) func() time.Duration {
	return func() time.Duration { return time.Duration(rand.Float64() * milliseconds * float64(time.Millisecond)) }
}

func every(milliseconds time.Duration) func() time.Duration {
	return func() time.Duration { return milliseconds * time.Millisecond }
}

// A request is one exchange. Times count from the beginning of the load.
type request struct {
	kind       string
	begin, end time.Duration
	pid        int    // of the process that answered
	failure    string // what went wrong, in short, or empty
}

// A process is one that has answered.
type process struct {
	pid  int
	seen time.Duration // when its first answer came
	exit time.Duration // when it ended, or zero
}

// load is a set of running clients.
type load struct {
	server *server
	began  time.Time
	cancel context.CancelFunc
	wait   sync.WaitGroup

	mu        sync.Mutex
	requests  []request
	processes []*process
}

// requestLimit is how long a client waits for an answer.
const requestLimit = 20 * time.Second

// startLoad returns when every client has had an answer.
func startLoad(ctx context.Context, s *server, kinds []kind) (*load, error) {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{server: s, began: time.Now(), cancel: cancel}
	var warm sync.WaitGroup
	for _, k := range kinds {
		if k.name == s.lacks {
			continue
		}
		var shared *http.Transport
		if k.http2 {
			shared = l.transport(k)
		}
		for range k.clients {
			transport := shared
			if transport == nil {
				transport = l.transport(k)
			}
			c := &client{load: l, kind: k, http: &http.Client{Transport: transport, Timeout: requestLimit}}
			warm.Add(1)
			l.wait.Go(func() { c.run(ctx, &warm) })
		}
	}
	warm.Wait()
	for _, r := range l.copyRequests() {
		if r.failure != "" {
			l.stop()
			return nil, fmt.Errorf("%s: a %s client fails without any upgrade: %s", s.name, r.kind, r.failure)
		}
	}
	return l, nil
}

func (l *load) copyRequests() []request {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.requests)
}

// stop ends the clients when they have finished what they have begun.
func (l *load) stop() {
	l.cancel()
	l.wait.Wait()
}

func (l *load) now() time.Duration { return time.Since(l.began) }

func (l *load) transport(k kind) *http.Transport {
	t := &http.Transport{
		DisableKeepAlives: k.fresh && !k.tls,
		Protocols:         new(http.Protocols),
		TLSClientConfig:   &tls.Config{RootCAs: l.server.roots, ServerName: certificateName},
	}
	t.Protocols.SetHTTP1(!k.http2)
	t.Protocols.SetHTTP2(k.http2)
	return t
}

// see notes that a process has answered, and when it ends.
func (l *load) see(pid int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.processes {
		if p.pid == pid {
			return
		}
	}
	p := &process{pid: pid, seen: l.now()}
	l.processes = append(l.processes, p)
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		p.exit = l.now() // it is gone already
		return
	}
	go func() {
		defer unix.Close(fd)
		for {
			// See pidfd_open(2): it is readable when the process has ended.
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			if err == nil {
				break
			}
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		p.exit = l.now()
	}()
}

// serving returns the process that was the last to appear.
func (l *load) serving() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.processes[len(l.processes)-1].pid
}

// handedOver reports whether a process has appeared since then, and whether all
// that had before are gone.
func (l *load) handedOver(since time.Duration) (appeared, gone bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	gone = true
	for _, p := range l.processes {
		if p.seen > since {
			appeared = true
		} else if p.exit == 0 {
			gone = false
		}
	}
	return appeared, gone
}

// client makes one request after another.
type client struct {
	load *load
	kind
	http *http.Client
	last int // the process that answered last
	sent int
}

func (c *client) run(ctx context.Context, warm *sync.WaitGroup) {
	c.exchange(time.Now())
	warm.Done()
	due := time.Now().Add(time.Duration(rand.Float64() * float64(c.pause()))) // not all at once
	for sleep(ctx, time.Until(due)) {
		begin := time.Now()
		// It is not a timer's delay that is to be measured, but the server's.
		if c.schedule && begin.Sub(due) > 2*time.Millisecond {
			begin = due
		}
		c.exchange(begin)
		if !c.schedule {
			due = time.Now()
		}
		due = due.Add(c.pause())
	}
}

// body cannot be replayed, since net/http does not know what it is, unless it is
// one for HTTP/2: there a server says which requests it has not processed.
func (c *client) body() io.Reader {
	body := bytes.NewReader(make([]byte, 1<<10))
	if c.http2 {
		return body
	}
	return struct{ io.Reader }{body}
}

func (c *client) exchange(begin time.Time) {
	r := request{kind: c.name, begin: begin.Sub(c.load.began)}
	pid, err := c.answer()
	r.end = c.load.now()
	r.pid = pid
	if err != nil {
		r.failure = category(err)
	} else if pid != c.last {
		c.last = pid
		c.load.see(pid)
	}
	c.load.mu.Lock()
	defer c.load.mu.Unlock()
	c.load.requests = append(c.load.requests, r)
}

func (c *client) request() (*http.Request, error) {
	url := "http://" + c.load.server.plain
	if c.tls {
		url = "https://" + c.load.server.tls
	}
	method, body := "GET", io.Reader(nil)
	c.sent++
	if c.post && (!c.http2 || c.sent%2 == 0) {
		method, body = "POST", c.body()
	}
	if c.tls && c.fresh && c.sent%10 == 0 {
		c.http.CloseIdleConnections()
	}
	return http.NewRequest(method, url+"/", body)
}

func (c *client) answer() (pid int, err error) {
	req, err := c.request()
	if err != nil {
		return 0, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK {
		return 0, errors.New("status " + resp.Status)
	}
	digits, whole := bytes.CutSuffix(content, []byte("\n"))
	pid, err = strconv.Atoi(string(digits))
	if err != nil || !whole {
		return 0, fmt.Errorf("wrong content")
	}
	return pid, nil
}

// category shortens an error to what several of them have in common.
func category(err error) string {
	var timeout net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.Is(err, syscall.ECONNRESET):
		return "connection reset"
	case errors.Is(err, syscall.EPIPE):
		return "broken pipe"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "connection closed"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	}
	for cause := errors.Unwrap(err); cause != nil; cause = errors.Unwrap(err) {
		err = cause
	}
	return err.Error()
}
