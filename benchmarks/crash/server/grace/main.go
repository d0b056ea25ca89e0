// Command grace is the pattern that github.com/facebookgo/grace documents. It offers no way
// to learn when the process is ready. That is just before Serve, whose listeners are inherited.
package main

import (
	"flag"
	"log"

	"example.com/tableflip/benchmarks/crash/server"
	"github.com/facebookgo/grace/gracehttp"
)

func main() {
	flag.Parse()
	server.Ready()
	if err := gracehttp.Serve(server.New()); err != nil {
		log.Fatal(err)
	}
}
