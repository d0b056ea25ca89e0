//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"time"

	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/testbed/wire"
)

// slowSender sends the head and the body of a POST in pieces, with gaps of up to
// half the idle grace, about a second in all.
func (t *target) slowSender() load.Exchanger {
	return func(_ context.Context, w *load.Worker, began time.Time) {
		e := load.Exchange{Began: began}
		e.By, e.Latency, e.Err = t.sendSlowly(w.Random)
		w.Record(e)
	}
}

func (t *target) sendSlowly(random *rand.Rand) (version int, latency time.Duration, err error) {
	conn, err := net.DialTimeout("tcp", t.tcp, load.Limit)
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(load.Limit))

	content := wire.Content(random.Uint64(), 100+random.IntN(8<<10))
	request := fmt.Appendf(nil, "POST / HTTP/1.1\r\nHost: testbed\r\nContent-Length: %d\r\n\r\n%s", len(content), content)
	rest := bytes.NewBuffer(request)
	// Cuts in the head are as likely as in the body.
	for _, size := range []int{1 + random.IntN(30), 1 + random.IntN(30), random.IntN(60), random.IntN(len(content)), rest.Len()} {
		piece := rest.Next(size)
		if len(piece) == 0 {
			continue
		}
		if _, err := conn.Write(piece); err != nil {
			return 0, 0, err
		}
		if rest.Len() > 0 {
			time.Sleep(time.Duration(random.Float64() * float64(t.grace) / 2))
		}
	}
	sent := time.Now()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, 0, err
	}
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, 0, err
	}
	version, err = check(resp, got, content)
	return version, time.Since(sent), err
}
