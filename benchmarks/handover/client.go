//go:build linux

package handover

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"time"
)

// Connect opens n connections one after another, and waits for the greeting on each.
func Connect(addr string, n int) error {
	for range n {
		if err := Greeted(addr); err != nil {
			return err
		}
	}
	return nil
}

// Greeted opens one connection and waits for the greeting.
func Greeted(addr string) error {
	conn, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	// The port is free again at once: there are fewer ports than connections.
	conn.(*net.TCPConn).SetLinger(0)
	conn.SetDeadline(time.Now().Add(patience))
	_, err = io.ReadFull(conn, make([]byte, 1))
	return err
}

// A Kept is a connection that a generation keeps while it drains. See StartDraining.
type Kept struct {
	PID int // of the generation

	conn    net.Conn
	answers *bufio.Reader
}

// Keep opens a connection to the generation in charge. The one before it may accept a
// connection, too, until it has closed its listener.
func (ch *Chain) Keep() (*Kept, error) {
	for begin := time.Now(); ; {
		conn, err := net.DialTimeout("tcp", ch.Serving.TCP, patience)
		if err != nil {
			return nil, err
		}
		k := &Kept{ch.Serving.PID, conn, bufio.NewReader(conn)}
		answers, err := k.ask()
		if err == nil && answers == k.PID {
			return k, nil
		}
		k.Close()
		if err == nil && time.Since(begin) > patience {
			err = fmt.Errorf("process %d still accepts in place of %d", answers, k.PID)
		}
		if err != nil {
			return nil, err
		}
	}
}

// Ask returns nil if the generation answers.
func (k *Kept) Ask() error {
	if answers, err := k.ask(); err != nil || answers != k.PID {
		return fmt.Errorf("process %d answers in place of %d (%v)", answers, k.PID, err)
	}
	return nil
}

func (k *Kept) ask() (answers int, err error) {
	k.conn.SetDeadline(time.Now().Add(patience))
	if _, err := k.conn.Write([]byte{'?'}); err != nil {
		return 0, err
	}
	_, err = fmt.Fscanln(k.answers, &answers)
	return answers, err
}

func (k *Kept) Close() error { return k.conn.Close() }

// exchange sends n datagrams, each after the answer to the one before.
func exchange(addr string, n int) error {
	conn, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	datagram := make([]byte, 16)
	for range n {
		if _, err := conn.Write(datagram); err != nil {
			return err
		}
		if _, err := conn.Read(datagram); err != nil {
			return err
		}
	}
	return nil
}
