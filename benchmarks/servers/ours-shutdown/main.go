// Command ours-shutdown upgrades by this library as example_test.go does, but drains by
// http.Server.Shutdown.
package main

import (
	"flag"
	"log"

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
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	go plain.Serve(plainListener)
	go tls.ServeTLS(tlsListener, "", "")
	<-upg.Exit()
	answer.Shutdown(plain, tls)
}
