// Command ssh is an SSH server that is upgraded while its sessions go on. It lets everybody
// in, and its only command answers with what it is named and given: put your own in the
// place of run and config. Flags and signals are those of the http example.
//
//	ssh-keygen -t ed25519 -N "" -f host && ./server -host-key host
//
// What is promised: no connection is refused or reset because of an upgrade. A connection
// stays with the process that accepted it, and its sessions go on to their end. The first
// session of each is served, however late it comes. Further ones are refused once the
// process is to exit: they have not begun, and can be opened on a new connection, which
// OpenSSH's ssh does by itself. Connections without a session are closed two seconds later.
//
// What is not: sessions that take longer than -drain are cut, so make that long, and
// service.Options.StopTimeout short. Nothing moves a session to the new process. When the
// service is stopped, connections that wait in the listener's queue are reset.
package main

import (
	"errors"
	"flag"
	"log"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
	"golang.org/x/crypto/ssh"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8022", "TCP `address` to serve on")
	hostKey := flag.String("host-key", "host", "`file` of the private key that all generations have")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	drain := flag.Duration("drain", time.Hour, "how long sessions may take to end before the process exits")
	flag.Parse()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile, Logger: slog.Default()})
	if err != nil {
		log.Fatal(err)
	}
	config, err := config(*hostKey)
	if err == nil {
		serve := func(ln net.Listener) error { return serve(ln, config, upg.Exit()) }
		err = service.Run(upg, service.Options{DrainTimeout: *drain}, service.Stream("tcp", *listen, serve, nil))
	}
	if err != nil {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

// serve returns when ln has been closed, and then all connections.
func serve(ln net.Listener, config *ssh.ServerConfig, exit <-chan struct{}) error {
	var connections sync.WaitGroup
	defer connections.Wait()
	for {
		conn, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return err
		} else if err != nil {
			slog.Warn("can't accept", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		connections.Go(func() { serveConn(conn, config, exit) })
	}
}

// config lets everybody in.
func config(hostKey string) (*ssh.ServerConfig, error) {
	pem, err := os.ReadFile(hostKey)
	if err != nil {
		return nil, err
	}
	signer, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		return nil, err
	}
	config := &ssh.ServerConfig{NoClientAuth: true}
	config.AddHostKey(signer)
	return config, nil
}
