// Package answer is what the servers written in Go have in common: what they
// answer, where they listen, and how long they may drain.
package answer

import (
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

var (
	PlainAddr = flag.String("plain", "", "`address` for HTTP")
	TLSAddr   = flag.String("tls", "", "`address` for HTTP over TLS")
	CertFile  = flag.String("cert", "", "PEM `file`")
	KeyFile   = flag.String("key", "", "PEM `file`")
	Drain     = flag.Duration("drain", 5*time.Second, "how long the old process may drain")
	IdleGrace = flag.Duration("grace", time.Second, "httpdrain's idle grace")
)

// Handler reads the request's body to its end and answers with the PID, which is
// all that nginx and HAProxy can say of themselves without a server behind them.
var Handler http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	fmt.Fprintln(w, os.Getpid())
})

// Plain and TLS return the two servers that each process runs.
func Plain() *http.Server { return &http.Server{Addr: *PlainAddr, Handler: Handler} }

func TLS() *http.Server {
	cert, err := tls.LoadX509KeyPair(*CertFile, *KeyFile)
	if err != nil {
		log.Fatal(err)
	}
	return &http.Server{
		Addr:      *TLSAddr,
		Handler:   Handler,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}},
		// A client that gives up in a handshake is no news.
		ErrorLog: log.New(io.Discard, "", 0),
	}
}

// UpgradeOnHangup calls upgrade for each SIGHUP.
func UpgradeOnHangup(upgrade func() error) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	go func() {
		for range hangup {
			if err := upgrade(); err != nil {
				log.Println("upgrade failed:", err)
			}
		}
	}()
}

// Shutdown drains both servers side by side, for as long as they may.
func Shutdown(plain, tls interface{ Shutdown(context.Context) error }) {
	ctx, cancel := context.WithTimeout(context.Background(), *Drain)
	defer cancel()
	var wait sync.WaitGroup
	wait.Go(func() { plain.Shutdown(ctx) })
	wait.Go(func() { tls.Shutdown(ctx) })
	wait.Wait()
}
