//go:build linux

package main

import (
	"bytes"
	"context"
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

	"example.com/tableflip/internal/load"
	"golang.org/x/sys/unix"
)

// This file is the clients, which are the same for all peers, and what they see.

const http2 = "HTTP/2"

// kindsFor returns the clients that upgrades are made under: 16 in all.
func kindsFor(s *server) []load.Kind {
	pause := load.UpTo(10 * time.Millisecond)
	// Well below the idle grace of a second, up to which httpdrain promises something.
	think := func(random *rand.Rand) time.Duration {
		return 100*time.Millisecond + load.UpTo(500*time.Millisecond)(random)
	}
	plain := func(fresh bool, ask func(*rand.Rand) load.Request) func() load.Exchanger {
		return load.HTTP{Addr: s.plain, Fresh: fresh, Ask: ask}.New
	}
	return []load.Kind{
		{Name: "new GET", Clients: 2, Pause: pause, New: plain(true, get)},
		{Name: "new POST", Clients: 2, Pause: pause, New: plain(true, post)},
		{Name: "keep-alive GET", Clients: 2, Pause: pause, New: plain(false, get)},
		{Name: "keep-alive POST", Clients: 2, Pause: pause, New: plain(false, post)},
		{Name: "thinking POST", Clients: 4, Pause: think, New: plain(false, post)},
		{Name: "TLS POST", Clients: 2, Pause: pause, New: load.HTTP{Addr: s.tls, Roots: s.roots, Renew: true, Ask: post}.New},
		// In HTTP/2, a server says which requests it has not processed.
		{Name: http2, Clients: 1, Workers: 2, Pause: pause, New: load.HTTP{
			Addr: s.tls, Roots: s.roots, Protocol: load.HTTP2, Replayable: true, Ask: getOrPost,
		}.New},
	}
}

// kindNames are the names of all of them.
var kindNames = func() (names []string) {
	for _, k := range kindsFor(new(server)) {
		names = append(names, k.Name)
	}
	return names
}()

// lastingKinds are those whose clients keep a connection until the server ends it.
var lastingKinds = []string{"keep-alive GET", "keep-alive POST", "thinking POST", http2}

// steadyKindsFor returns the clients by which latency is measured. The idle grace of the
// servers is shorter then.
func steadyKindsFor(s *server) []load.Kind {
	every := func(*rand.Rand) time.Duration { return 10 * time.Millisecond }
	return []load.Kind{
		{Name: "new GET", Clients: 2, Schedule: true, Pause: every, New: load.HTTP{Addr: s.plain, Fresh: true, Ask: get}.New},
		{Name: "keep-alive GET", Clients: 4, Schedule: true, Pause: every, New: load.HTTP{Addr: s.plain, Ask: get}.New},
	}
}

func get(*rand.Rand) load.Request { return load.Request{Check: check} }

func post(*rand.Rand) load.Request {
	return load.Request{Body: make([]byte, 1<<10), Check: check}
}

func getOrPost(random *rand.Rand) load.Request {
	if random.IntN(2) == 0 {
		return get(random)
	}
	return post(random)
}

// check returns the PID in an answer.
func check(resp *http.Response, body []byte) (pid int, err error) {
	if resp.StatusCode != http.StatusOK {
		return 0, errors.New("status " + resp.Status)
	}
	digits, whole := bytes.CutSuffix(body, []byte("\n"))
	pid, err = strconv.Atoi(string(digits))
	if err != nil || !whole {
		return 0, errors.New("wrong content")
	}
	return pid, nil
}

// A request is one exchange. Times count from the beginning of the load.
type request struct {
	kind       string
	begin, end time.Duration
	pid        int    // of the process that answered
	opened     int    // connections, for this request
	failure    string // what went wrong, in short, or empty
}

// A process is one that has answered.
type process struct {
	pid  int
	seen time.Duration // when its first answer came
	exit time.Duration // when it ended, or zero
}

// traffic is a set of running clients.
type traffic struct {
	began   time.Time
	cancel  context.CancelFunc
	clients *load.Load

	mu        sync.Mutex
	requests  []request
	processes []*process
}

// startTraffic returns when every client has had an answer.
func startTraffic(ctx context.Context, s *server, kinds []load.Kind) (*traffic, error) {
	ctx, cancel := context.WithCancel(ctx)
	tr := &traffic{began: time.Now(), cancel: cancel}
	kinds = slices.DeleteFunc(kinds, func(k load.Kind) bool { return k.Name == s.lacks })
	tr.clients = load.Start(ctx, kinds, rand.Uint64(), tr.record)
	tr.clients.AwaitFirst()
	for _, r := range tr.copyRequests() {
		if r.failure != "" {
			tr.stop()
			return nil, fmt.Errorf("%s: a %s client fails without any upgrade: %s", s.name, r.kind, r.failure)
		}
	}
	return tr, nil
}

func (tr *traffic) record(e load.Exchange) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	r := request{kind: e.Kind, begin: e.Began.Sub(tr.began), end: e.Ended.Sub(tr.began), pid: e.By, opened: e.Opened}
	if e.Err != nil {
		r.failure = category(e.Err)
	} else {
		tr.see(e.By)
	}
	tr.requests = append(tr.requests, r)
}

func (tr *traffic) copyRequests() []request {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return slices.Clone(tr.requests)
}

// stop ends the clients when they have finished what they have begun.
func (tr *traffic) stop() {
	tr.cancel()
	tr.clients.Wait()
}

func (tr *traffic) now() time.Duration { return time.Since(tr.began) }

// see notes that a process has answered, and when it ends. The load is locked.
func (tr *traffic) see(pid int) {
	for _, p := range tr.processes {
		if p.pid == pid {
			return
		}
	}
	p := &process{pid: pid, seen: tr.now()}
	tr.processes = append(tr.processes, p)
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		p.exit = tr.now() // it is gone already
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
		tr.mu.Lock()
		defer tr.mu.Unlock()
		p.exit = tr.now()
	}()
}

// serving returns the process that was the last to appear.
func (tr *traffic) serving() int {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.processes[len(tr.processes)-1].pid
}

// handedOver reports whether a process has appeared since then, and whether all
// that had before are gone.
func (tr *traffic) handedOver(since time.Duration) (appeared, gone bool) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	gone = true
	for _, p := range tr.processes {
		if p.seen > since {
			appeared = true
		} else if p.exit == 0 {
			gone = false
		}
	}
	return appeared, gone
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
