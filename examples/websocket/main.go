// Command websocket is an echo server that is upgraded while its clients stay connected.
//
// Each message is sent back after "version=VERSION pid=PID ". Flags: see the http example.
// What is promised: no connection is refused or reset because of an upgrade. When the process
// is to end, it answers the message that it is handling on a connection, and then sends a
// close frame: 1012 (service restart) after an upgrade, upon which the client can connect
// again at once, or 1001 (going away). A message that has no answer before the close frame
// has not been handled, and can be sent again.
// What is not: a client that does not answer the close frame in five seconds is cut off.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
	"github.com/coder/websocket"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8080", "TCP `address` to serve on")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	drain := flag.Duration("drain", 30*time.Second, "how long clients may stay before the process exits")
	flag.Parse()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile, Logger: slog.Default()})
	if err == nil {
		opts := service.Options{DrainTimeout: *drain, WaitHijacked: true}
		err = service.Run(upg, opts, service.HTTP(&http.Server{Addr: *listen, Handler: server{upg, echo}}))
	}
	if err != nil {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

// echo answers messages: put your own in its place.
func echo(conn *websocket.Conn, kind websocket.MessageType, message []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return conn.Write(ctx, kind, fmt.Appendf(nil, "version=%s pid=%d %s", version, os.Getpid(), message))
}

// A server has messages handled, one at a time on each connection. An error closes it.
type server struct {
	upg    service.Upgrader
	handle func(conn *websocket.Conn, kind websocket.MessageType, message []byte) error
}

// ServeHTTP makes a WebSocket of the connection, and returns when it is closed.
func (s server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer conn.CloseNow()
	var handling sync.Mutex // held while a message is handled, and while the server leaves
	left, closed := false, make(chan struct{})
	defer close(closed)
	go func() {
		select {
		case <-s.upg.Exit():
			handling.Lock()
			defer handling.Unlock()
			left = true
			goodbye := websocket.StatusGoingAway
			if s.upg.Replaced() {
				goodbye = websocket.StatusServiceRestart
			}
			conn.Close(goodbye, "") // It waits for the client's answer.
		case <-closed:
		}
	}()
	for {
		kind, message, err := conn.Read(context.Background())
		if err != nil {
			return
		}

		handling.Lock()
		if !left { // Otherwise it has crossed the close frame.
			err = s.handle(conn, kind, message)
		}
		handling.Unlock()
		if err != nil {
			return
		}
	}
}
