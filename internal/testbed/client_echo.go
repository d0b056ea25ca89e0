//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/testbed/wire"
)

// tcpEcho keeps connections for up to a second, which is less than the drain
// deadline. A connection belongs to the process that accepted it until the client
// ends it.
func (t *target) tcpEcho() load.Exchanger { return t.echoConnection }

// echoConnection records an exchange for the greeting and one for each echo, which
// began when the connection had worked last.
func (t *target) echoConnection(ctx context.Context, w *load.Worker, good time.Time) {
	end := good.Add(time.Duration(w.Random.Float64() * float64(time.Second)))
	version := 0
	done := func(sent time.Time, err error) error {
		w.Record(load.Exchange{Began: good, Latency: time.Since(sent), By: version, Err: err})
		good = time.Now()
		return err
	}
	conn, err := net.DialTimeout("tcp", t.echo, load.Limit)
	if err != nil {
		done(good, err)
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(load.Limit))
	answers := bufio.NewReader(conn)
	greeting, err := answers.ReadString('\n')
	if err == nil {
		version, err = wire.ParseVersion(strings.TrimSpace(greeting))
	}
	if done(good, err) != nil {
		return
	}

	for time.Now().Before(end) {
		time.Sleep(load.UpTo(4 * t.pace)(w.Random))
		content := wire.Content(w.Random.Uint64(), 1+w.Random.IntN(2<<10))
		sent := time.Now()
		if done(sent, echoed(conn, answers, content)) != nil {
			return
		}
		if ctx.Err() != nil {
			break
		}
	}

	// The end is the client's, and clean.
	conn.(*net.TCPConn).CloseWrite()
	if rest, err := io.ReadAll(answers); err != nil || len(rest) > 0 {
		done(good, errors.Join(fmt.Errorf("end: %d bytes too many", len(rest)), err))
	}
}

func echoed(conn net.Conn, answers io.Reader, content []byte) error {
	if _, err := conn.Write(content); err != nil {
		return err
	}
	got := make([]byte, len(content))
	if n, err := io.ReadFull(answers, got); err != nil {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	if !bytes.Equal(got, content) {
		return mismatch(got, content)
	}
	return nil
}
