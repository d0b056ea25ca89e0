// Command restart knows of no upgrade: it is a net/http server that Shutdown ends,
// as net/http documents. It is replaced by a stop and a start.
package main

import (
	"context"
	"flag"
	"log"
	"net/http"
	"os/signal"
	"syscall"

	"example.com/tableflip/benchmarks/servers/answer"
)

func main() {
	flag.Parse()
	terminated, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	plain, tls := answer.Plain(), answer.TLS()
	go func() {
		if err := plain.ListenAndServe(); err != http.ErrServerClosed {
			log.Fatal(err)
		}
	}()
	go func() {
		if err := tls.ListenAndServeTLS("", ""); err != http.ErrServerClosed {
			log.Fatal(err)
		}
	}()
	<-terminated.Done()
	answer.Shutdown(plain, tls)
}
