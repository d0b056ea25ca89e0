//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// datagrams answers each datagram with the version and the datagram. It answers
// what it has read before it goes; the rest is in the queue for its successor.
type datagrams struct {
	conn   net.PacketConn
	served chan struct{}
}

func newDatagrams(conn net.PacketConn) *datagrams {
	return &datagrams{conn: conn, served: make(chan struct{})}
}

func (d *datagrams) serve() error {
	defer close(d.served)
	datagram := make([]byte, 64<<10)
	for {
		n, client, err := d.conn.ReadFrom(datagram)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		d.conn.WriteTo(fmt.Appendf(nil, "%s %s", version, datagram[:n]), client)
	}
}

// drain ends the reads by a deadline, which is this process's own, where closing
// would keep a datagram that was read from being answered.
func (d *datagrams) drain(context.Context) error {
	d.conn.SetReadDeadline(time.Unix(1, 0))
	<-d.served
	return d.conn.Close()
}
