package httpdrain

import (
	"io"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"
)

// The kernel tells when something was received, and when something was sent. It may tell
// of an earlier moment if the machine stands still, and never of a later one.
func TestLastTransfer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	nc, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	ask := func() (received, sent time.Time) {
		t.Helper()
		// A connection that is wrapped is asked as well.
		received, sent, ok := lastTransfer(New(new(http.Server)).framed(nc), time.Now())
		if !ok {
			t.Fatal("the kernel does not tell")
		}
		return received, sent
	}
	// move carries bytes until the kernel tells of a moment after the first of them.
	move := func(from, to net.Conn, last func() time.Time) {
		t.Helper()
		for begin := time.Now(); !last().After(begin.Add(2 * transferTick)); {
			if time.Since(begin) > 30*time.Second {
				t.Fatal("the kernel does not tell")
			}
			from.Write([]byte("x"))
			if _, err := io.ReadFull(to, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	begin := time.Now()
	move(client, nc, func() time.Time { received, _ := ask(); return received })
	if _, sent := ask(); sent.After(begin.Add(transferTick)) {
		t.Errorf("sent %v after nothing was", sent.Sub(begin))
	}
	begin = time.Now()
	move(nc, client, func() time.Time { _, sent := ask(); return sent })
	if received, _ := ask(); received.After(begin.Add(transferTick)) {
		t.Errorf("received %v after nothing was", received.Sub(begin))
	}
	nc.Close()
	if _, _, ok := lastTransfer(nc, time.Now()); ok {
		t.Error("the kernel tells of a connection that is closed")
	}
}

// Of a connection that is not TCP's, the kernel does not tell.
func TestLastTransferOfUnix(t *testing.T) {
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	nc, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, _, ok := lastTransfer(nc, time.Now()); ok {
		t.Error("it does")
	}
}
