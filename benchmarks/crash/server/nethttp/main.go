// Command nethttp knows of no upgrade. It is ended by Shutdown, and takes its listener from
// systemd if there is one, so that connections wait in its queue while nobody serves.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"

	"example.com/tableflip/benchmarks/crash/server"
)

func main() {
	flag.Parse()
	terminated, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	s := server.New()
	ln, err := listen(s.Addr)
	if err != nil {
		log.Fatal(err)
	}
	go s.Serve(ln)
	server.Ready()
	<-terminated.Done()
	server.Shutdown(s)
}

func listen(addr string) (net.Listener, error) {
	if os.Getenv("LISTEN_FDS") == "1" { // see sd_listen_fds(3)
		return net.FileListener(os.NewFile(3, "activated"))
	}
	return net.Listen("tcp", addr)
}
