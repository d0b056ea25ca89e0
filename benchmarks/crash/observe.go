//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"example.com/tableflip/internal/load"
)

// This file is the clients, and what they see of the crashes.

// A crash is what the clients saw of one.
type crash struct {
	// Gap is the time from the crash to the next good answer, or never.
	Gap time.Duration

	// Sent and Failed count requests since the last crash's end: from the deployment to
	// half a second after the next good answer, or until it is waited for no longer.
	Sent, Failed int
}

const never = time.Duration(math.MaxInt64)

// calm is how long a crash is observed after the next good answer.
const calm = 500 * time.Millisecond

// A deployer is a service.
type deployer interface {
	start() error                  // the good version
	deploy() error                 // the bad one
	paths() (addr, crashes string) // see server
}

// traffic is clients at work.
type traffic struct {
	addr string

	mu        sync.Mutex
	exchanges []load.Exchange
	bad       map[int]bool // PIDs of the version that crashes
}

// observe has the version crash this number of times. A service that is not back after
// patience is started again.
func observe(d deployer, number int, patience time.Duration) (crashes []crash, err error) {
	addr, file := d.paths()
	if err := start(d, addr); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	t := &traffic{addr: addr, bad: make(map[int]bool)}
	clients := load.Start(ctx, t.kinds(), rand.Uint64(), t.record)
	defer clients.Wait()
	defer cancel()
	clients.AwaitFirst()

	begin := time.Now()
	for i := range number {
		if !t.isBad() {
			if err := d.deploy(); err != nil {
				return nil, err
			}
		}
		pid, at, err := awaitCrash(file, i)
		if err != nil {
			return nil, err
		}
		c := crash{Gap: t.awaitAnswer(pid, at, patience)}
		load.Sleep(ctx, calm)
		end := time.Now()
		c.Sent, c.Failed = t.count(begin, end)
		crashes = append(crashes, c)
		if c.Gap == never && i < number-1 {
			if err := start(d, addr); err != nil {
				return nil, err
			}
			end = time.Now()
			t.awaitAnswer(pid, end, time.Minute)
		}
		begin = end
	}
	return crashes, nil
}

// start starts the good version, and waits until it answers.
func start(d deployer, addr string) error {
	if err := d.start(); err != nil {
		return err
	}
	return within(10*time.Second, "an answer", func() bool {
		_, err := ask(addr)
		return err == nil
	})
}

func (t *traffic) kinds() []load.Kind {
	pause := load.UpTo(10 * time.Millisecond)
	get := func(*rand.Rand) load.Request { return load.Request{Check: t.check} }
	post := func(*rand.Rand) load.Request { return load.Request{Body: make([]byte, 1<<10), Check: t.check} }
	return []load.Kind{
		{Name: "new GET", Clients: 2, Pause: pause, New: load.HTTP{Addr: t.addr, Fresh: true, Ask: get}.New},
		{Name: "keep-alive POST", Clients: 2, Pause: pause, New: load.HTTP{Addr: t.addr, Ask: post}.New},
	}
}

func (t *traffic) check(resp *http.Response, body []byte) (pid int, err error) {
	if resp.StatusCode != http.StatusOK {
		return 0, errors.New("status " + resp.Status)
	}
	var bad bool
	if _, err := fmt.Sscanln(string(body), &pid, &bad); err != nil {
		return 0, fmt.Errorf("wrong content: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bad[pid] = bad
	return pid, nil
}

func (t *traffic) record(e load.Exchange) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.exchanges = append(t.exchanges, e)
}

// isBad reports whether the last answer was one of the version that crashes.
func (t *traffic) isBad() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range slices.Backward(t.exchanges) {
		if e.Err == nil {
			return t.bad[e.By]
		}
	}
	return false
}

// count counts the requests that ended in this time.
func (t *traffic) count(begin, end time.Time) (sent, failed int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.exchanges {
		if e.Ended.Before(begin) || !e.Ended.Before(end) {
			continue
		}
		sent++
		if e.Err != nil {
			failed++
		}
	}
	return sent, failed
}

// awaitAnswer returns how long after the crash of the process pid another one answered a
// request of after it, on a new connection: a process that still drains its connections does
// not count.
func (t *traffic) awaitAnswer(pid int, crashed time.Time, patience time.Duration) time.Duration {
	gap := never
	within(time.Until(crashed.Add(patience)), "an answer", func() bool {
		t.mu.Lock()
		defer t.mu.Unlock()
		for _, e := range t.exchanges {
			if e.Err == nil && e.Opened > 0 && e.By != pid && e.Began.After(crashed) {
				gap = min(gap, e.Ended.Sub(crashed))
			}
		}
		return gap != never
	})
	return gap
}

// awaitCrash returns which process has crashed, and when, as the file's line of this
// number has it.
func awaitCrash(file string, number int) (pid int, at time.Time, err error) {
	err = within(15*time.Second, "a crash", func() bool {
		content, _ := os.ReadFile(file)
		lines := bufio.NewScanner(bytes.NewReader(content))
		for range number + 1 {
			if !lines.Scan() {
				return false
			}
		}
		var nano int64
		n, _ := fmt.Sscan(lines.Text(), &pid, &nano)
		at = time.Unix(0, nano)
		return n == 2
	})
	return pid, at, err
}

// within tries until something is true.
func within(limit time.Duration, what string, try func() bool) error {
	for deadline := time.Now().Add(limit); !try(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("there was not %s within %v", what, limit)
		}
	}
	return nil
}
