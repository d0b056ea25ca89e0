// Command tableflip-httpdrain is the pattern that github.com/cloudflare/tableflip
// documents, except that it drains by httpdrain.
package main

import (
	"flag"
	"log"

	"example.com/tableflip/benchmarks/servers/answer"
	"example.com/tableflip/httpdrain"
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
	plainDrainer, tlsDrainer := httpdrain.New(plain), httpdrain.New(tls)
	plainDrainer.IdleGrace, tlsDrainer.IdleGrace = *answer.IdleGrace, *answer.IdleGrace
	go plainDrainer.Serve(plainListener)
	go tlsDrainer.ServeTLS(tlsListener, "", "")
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	<-upg.Exit()
	answer.Shutdown(plainDrainer, tlsDrainer)
}
