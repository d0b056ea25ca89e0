// Command tableflip is the pattern that github.com/cloudflare/tableflip documents.
package main

import (
	"flag"
	"log"

	"example.com/tableflip/benchmarks/crash/server"
	"example.com/tableflip/benchmarks/servers/answer"
	"github.com/cloudflare/tableflip"
)

func main() {
	flag.Parse()
	upg, err := tableflip.New(tableflip.Options{PIDFile: *server.PIDFile})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()
	answer.UpgradeOnHangup(upg.Upgrade)
	s := server.New()
	ln, err := upg.Listen("tcp", s.Addr)
	if err != nil {
		log.Fatal(err)
	}
	go s.Serve(ln)
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	server.Ready()
	<-upg.Exit()
	server.Shutdown(s)
}
