//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"time"

	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/testbed/wire"
)

// datagrams has up to four requests in flight, and sends each only once. No answer in
// datagramLimit is a loss: nothing else loses datagrams on the loopback device
// while so few wait.
func (t *target) datagrams() load.Exchanger {
	return func(_ context.Context, w *load.Worker, began time.Time) { t.burst(w, began, 1+w.Random.IntN(4)) }
}

const datagramLimit = 5 * time.Second

// burst uses a socket of its own, so that no answer is taken for a later one's.
func (t *target) burst(w *load.Worker, began time.Time, n int) {
	conn, err := net.Dial("udp", t.udp)
	if err != nil {
		w.Record(load.Exchange{Began: began, Err: err})
		return
	}
	defer conn.Close()
	waiting := make(map[string]bool)
	fail := func(err error) {
		for range waiting {
			w.Record(load.Exchange{Began: began, Err: err})
		}
	}
	for range n {
		content := wire.Content(w.Random.Uint64(), 16+w.Random.IntN(512))
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
			w.Record(load.Exchange{Began: began, Err: err})
			continue
		}
		delete(waiting, string(content))
		w.Record(load.Exchange{Began: began, Latency: time.Since(began), By: version})
	}
}
