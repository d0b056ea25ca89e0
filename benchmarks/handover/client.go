//go:build linux

package handover

import (
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
