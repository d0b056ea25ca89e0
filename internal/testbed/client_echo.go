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

	"example.com/tableflip/internal/testbed/wire"
)

// tcpEcho keeps connections for up to a second, which is less than the drain
// deadline. A connection belongs to the process that accepted it until the client
// ends it.
func tcpEcho(ctx context.Context, c *client) {
	for c.rest(ctx) {
		c.echoConnection(ctx)
	}
}

func (c *client) echoConnection(ctx context.Context) {
	good := time.Now() // the last time at which the connection worked
	end := good.Add(time.Duration(c.random.Float64() * float64(time.Second)))
	version := 0
	done := func(err error) error {
		c.record.add(outcome{c.kind, good, time.Since(good), version, err, ""})
		good = time.Now()
		return err
	}
	conn, err := net.DialTimeout("tcp", c.target.echo, exchangeLimit)
	if err != nil {
		done(err)
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(exchangeLimit))
	answers := bufio.NewReader(conn)
	greeting, err := answers.ReadString('\n')
	if err == nil {
		version, err = wire.ParseVersion(strings.TrimSpace(greeting))
	}
	if done(err) != nil {
		return
	}
	for time.Now().Before(end) {
		pause := time.Duration(c.random.Float64() * 4 * float64(c.pace))
		time.Sleep(pause)
		content := wire.Content(c.random.Uint64(), 1+c.random.IntN(2<<10))
		sent := time.Now()
		err := echoed(conn, answers, content)
		o := outcome{c.kind, good, time.Since(sent), version, err, ""}
		c.record.add(o)
		if err != nil {
			return
		}
		good = time.Now()
		if ctx.Err() != nil {
			break
		}
	}
	// The end is the client's, and clean.
	conn.(*net.TCPConn).CloseWrite()
	if rest, err := io.ReadAll(answers); err != nil || len(rest) > 0 {
		done(errors.Join(fmt.Errorf("end: %d bytes too many", len(rest)), err))
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
