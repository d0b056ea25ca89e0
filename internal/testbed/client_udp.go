//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"time"

	"example.com/tableflip/internal/testbed/wire"
)

// udp has up to four requests in flight, and sends each only once. No answer in
// datagramLimit is a loss: nothing else loses datagrams on the loopback device
// while so few wait.
func udp(ctx context.Context, c *client) {
	for c.rest(ctx) {
		c.burst(1 + c.random.IntN(4))
	}
}

const datagramLimit = 5 * time.Second

// burst uses a socket of its own, so that no answer is taken for a later one's.
func (c *client) burst(n int) {
	began := time.Now()
	conn, err := net.Dial("udp", c.target.udp)
	if err != nil {
		c.record.add(outcome{kind: c.kind, suspect: began, err: err})
		return
	}
	defer conn.Close()
	waiting := make(map[string]bool)
	fail := func(err error) {
		for range waiting {
			c.record.add(outcome{kind: c.kind, suspect: began, err: err})
		}
	}
	for range n {
		content := wire.Content(c.random.Uint64(), 16+c.random.IntN(512))
		waiting[string(content)] = true
		if _, err := conn.Write(content); err != nil {
			fail(err)
			return
		}
	}
	conn.SetReadDeadline(began.Add(datagramLimit))
	answer := make([]byte, 2<<10)
	for len(waiting) > 0 {
		n, err := conn.Read(answer)
		if err != nil {
			fail(err)
			return
		}
		name, content, _ := bytes.Cut(answer[:n], []byte(" "))
		version, err := wire.ParseVersion(string(name))
		if err == nil && !waiting[string(content)] {
			err = fmt.Errorf("content: an answer to nothing: %.40q", content)
		}
		if err != nil {
			c.record.add(outcome{kind: c.kind, suspect: began, err: err})
			continue
		}
		delete(waiting, string(content))
		c.record.add(outcome{kind: c.kind, latency: time.Since(began), version: version})
	}
}
