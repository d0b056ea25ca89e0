// Command tableflip is the pattern that github.com/cloudflare/tableflip documents.
package main

import (
	"flag"
	"log"

	"example.com/tableflip/benchmarks/servers/answer"
	"github.com/cloudflare/tableflip"
)

func main() {
	flag.Parse()
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()
	answer.UpgradeOnHangup(upg.Upgrade)
	plain, tls := answer.Plain(), answer.TLS()
	plainListener, err := upg.Listen("tcp", plain.Addr)
	if err != nil {
		log.Fatal(err)
	}
	tlsListener, err := upg.Listen("tcp", tls.Addr)
	if err != nil {
		log.Fatal(err)
	}
	go plain.Serve(plainListener)
	go tls.ServeTLS(tlsListener, "", "")
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	<-upg.Exit()
	answer.Shutdown(plain, tls)
}
