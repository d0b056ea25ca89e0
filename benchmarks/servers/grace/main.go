// Command grace is the pattern that github.com/facebookgo/grace documents: gracehttp.Serve
// takes the place of the servers' own methods, and restarts on SIGUSR2. It offers no limit
// for the time that the old process may drain.
package main

import (
	"flag"
	"log"

	"example.com/tableflip/benchmarks/servers/answer"
	"github.com/facebookgo/grace/gracehttp"
)

func main() {
	flag.Parse()
	tls := answer.TLS()
	tls.TLSConfig.NextProtos = []string{"h2", "http/1.1"}
	if err := gracehttp.Serve(answer.Plain(), tls); err != nil {
		log.Fatal(err)
	}
}
