// Command ours-shutdown upgrades by this library, as in its README, but drains by
// http.Server.Shutdown.
package main

import (
	"context"
	"flag"
	"log"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"example.com/tableflip"
	"example.com/tableflip/benchmarks/servers/answer"
)

func main() {
	flag.Parse()
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()
	go func() {
		hangup := make(chan os.Signal, 1)
		signal.Notify(hangup, syscall.SIGHUP)
		for range hangup {
			if err := upg.Upgrade(); err != nil {
				log.Println("upgrade failed:", err)
			}
		}
	}()
	plain, tls := answer.Plain(), answer.TLS()
	plainListener, err := upg.Listen("tcp", plain.Addr)
	if err != nil {
		log.Fatal(err)
	}
	tlsListener, err := upg.Listen("tcp", tls.Addr)
	if err != nil {
		log.Fatal(err)
	}
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	go plain.Serve(plainListener)
	go tls.ServeTLS(tlsListener, "", "")
	<-upg.Exit()

	ctx, cancel := context.WithTimeout(context.Background(), *answer.Drain)
	defer cancel()
	var wait sync.WaitGroup
	for _, server := range []*http.Server{plain, tls} {
		wait.Go(func() { server.Shutdown(ctx) })
	}
	wait.Wait()
}
