//go:build unix

// Command either is a service that is written as cloudflare/tableflip documents it: HTTP
// over TCP and a Unix socket, and an echo over UDP. With the build tag "cloudflare" it uses
// that library, and ours without. Every answer begins with the version and the process ID.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

// version is "version-NUMBER-BEHAVIOUR", which the tests write over. The behaviour is
// "good", or "tell" if this version tells the service manager itself that it is the main
// process, and up.
var version = "version-000000-good"

func main() {
	pidFile := flag.String("pid-file", "", "`file` for the process ID")
	flag.Parse()
	log.SetFlags(0)
	if err := run(*pidFile); err != nil {
		log.Fatal(err)
	}
}

func run(pidFile string) error {
	upg, err := newUpgrader(pidFile)
	if err != nil {
		return err
	}
	defer upg.Stop()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM)
	go obey(signals, upg)

	tcp, err := upg.Listen("tcp", ":8080")
	if err != nil {
		return err
	}
	unix, err := upg.Listen("unix", "/run/web.sock")
	if err != nil {
		return err
	}
	udp, err := upg.ListenPacket("udp", ":8053")
	if err != nil {
		return err
	}
	if err := ready(upg); err != nil {
		return err
	}

	srv := newServer(&http.Server{Handler: http.HandlerFunc(answer)})
	go srv.Serve(tcp)
	go srv.Serve(unix)
	var echoing sync.WaitGroup
	echoing.Go(func() { echo(udp) })
	<-upg.Exit()
	udp.SetReadDeadline(time.Unix(1, 0))
	echoing.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return shutdown(ctx, srv, upg)
}

// obey upgrades on SIGHUP, and stops on SIGTERM.
func obey(signals <-chan os.Signal, upg *upgrader) {
	for sig := range signals {
		if sig == syscall.SIGTERM {
			upg.Stop()
		} else if err := upg.Upgrade(); err != nil {
			log.Print("upgrade failed: ", err)
		}
	}
}

// tell does what sd_notify(3) does, if this version is to.
func tell() error {
	if !strings.HasSuffix(version, "-tell") {
		return nil
	}
	manager, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET"))
	if err != nil {
		return err
	}
	defer manager.Close()
	_, err = fmt.Fprintf(manager, "MAINPID=%d\nREADY=1", os.Getpid())
	return err
}

func answer(w http.ResponseWriter, r *http.Request) {
	if body, err := io.ReadAll(r.Body); err == nil {
		fmt.Fprintf(w, "%s %d %s", version, os.Getpid(), body)
	}
}

// echo answers datagrams until the deadline of conn.
func echo(conn net.PacketConn) {
	datagram := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(datagram)
		if err != nil {
			return
		}
		conn.WriteTo(fmt.Appendf(nil, "%s %d %s", version, os.Getpid(), datagram[:n]), from)
	}
}
