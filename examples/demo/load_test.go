package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
)

// serve returns the URL of a server that is closed at the end of the test.
func serve(t *testing.T, handler http.HandlerFunc) string {
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server.URL
}

func TestLoad(t *testing.T) {
	var requests atomic.Int64
	enough := make(chan struct{})
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		n := requests.Add(1)
		if n == 100 {
			close(enough)
		}
		if n == 50 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "version=%s pid=7\n", r.Method)
	})

	l := startLoad(url, 4)
	<-enough
	total := l.stop()
	gets, posts := total.served[identity{"GET", 7}], total.served[identity{"POST", 7}]
	if gets == 0 || posts == 0 {
		t.Errorf("%d GET, %d POST", gets, posts)
	}
	if len(total.failures) != 1 || total.failures[0].reason != "status 503" {
		t.Errorf("failures: %+v", total.failures)
	}
	if got, want := int64(gets+posts), requests.Load()-1; got != want || l.served.Load() != want {
		t.Errorf("%d of %d were counted, and %d shown", got, want, l.served.Load())
	}
	if l.failed.Load() != 1 {
		t.Errorf("%d failures shown", l.failed.Load())
	}
}

func TestConnections(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, port, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "version=%s pid=%s\n", r.Method, port)
	})
	for name, test := range map[string]struct {
		client      *client
		connections int
	}{
		"GET":  {newConnectionClient(), 3},
		"POST": {keepAliveClient(), 1},
	} {
		t.Run(name, func(t *testing.T) {
			c := test.client
			c.served = map[identity]int{}
			defer c.transport.CloseIdleConnections()
			for range 3 {
				if !c.try(url) {
					t.Errorf("%+v", c.failures)
				}
			}
			if len(c.served) != test.connections {
				t.Errorf("3 requests on %d connections", len(c.served))
			}
		})
	}
}

func TestWrongAnswers(t *testing.T) {
	for _, body := range []string{
		"",
		"version=v1 pid=1",
		"version=v1 pid=0\n",
		"version=v1 pid=x\n",
		"version= pid=1\n",
		"version=v1 pid=1\n\n",
		"hello\nversion=v1 pid=1\n",
		strings.Repeat("x", 5000),
	} {
		c := newConnectionClient()
		c.served = map[identity]int{}
		if c.try(serve(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) })) {
			t.Errorf("%q was accepted", body)
		}
		if len(c.failures) != 1 || len(c.served) != 0 {
			t.Errorf("%q: %+v", body, c)
		}
	}
}

// A server that takes a second request on a connection, and closes it instead of
// answering, has lost it. The client must say so, and not try again.
func TestLostRequestIsNotRepeated(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	requests := make(chan int, 1)
	go func() {
		n := 0
		defer func() { requests <- n }()
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			reader := bufio.NewReader(conn)
			for range 2 {
				request, err := http.ReadRequest(reader)
				if err != nil {
					break
				}
				io.Copy(io.Discard, request.Body)
				n++
				if n != 2 {
					io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\nversion=v1 pid=7\n")
				}
			}
			conn.Close()
		}
	}()

	c := keepAliveClient()
	c.served = map[identity]int{}
	url := "http://" + ln.Addr().String()
	c.try(url)
	c.try(url)
	c.transport.CloseIdleConnections()
	ln.Close()
	if n := <-requests; n != 2 {
		t.Errorf("the server got %d requests", n)
	}
	if len(c.failures) != 1 || !c.failures[0].reused {
		t.Fatalf("%+v", c.failures)
	}
}

func TestNobodyListens(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	c := newConnectionClient()
	if c.try("http://" + ln.Addr().String()) {
		t.Fatal("there was an answer")
	}
	f := c.failures[0]
	if strings.Contains(f.reason, "127.0.0.1") {
		t.Errorf("the reason names an address: %s", f.reason)
	}
	if f.reused || f.ended.Before(f.began) {
		t.Errorf("%+v", f)
	}
}
