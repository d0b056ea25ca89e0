// Command overseer is the pattern that github.com/jpillora/overseer documents for restarts
// alone.
package main

import (
	"flag"
	"log"

	"example.com/tableflip/benchmarks/crash/server"
	"github.com/jpillora/overseer"
)

func main() {
	flag.Parse()
	overseer.Run(overseer.Config{Program: program, Address: *server.Addr})
}

func program(state overseer.State) {
	server.Ready()
	log.Println(server.New().Serve(state.Listener))
	// The listener is closed when overseer begins to end the program. It then ends the
	// process itself, as soon as no connection is left.
	<-make(chan struct{})
}
