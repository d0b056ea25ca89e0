// Command overseer is the pattern that github.com/jpillora/overseer documents for
// restarts alone: its program serves state's listeners until it is ended. Its
// TerminateTimeout is as short as the drain of the others.
package main

import (
	"flag"
	"log"

	"example.com/tableflip/benchmarks/servers/answer"
	"github.com/jpillora/overseer"
)

func main() {
	flag.Parse()
	overseer.Run(overseer.Config{
		Program:          program,
		Addresses:        []string{*answer.PlainAddr, *answer.TLSAddr},
		TerminateTimeout: *answer.Drain,
	})
}

func program(state overseer.State) {
	go func() { log.Println(answer.TLS().ServeTLS(state.Listeners[1], "", "")) }()
	log.Println(answer.Plain().Serve(state.Listeners[0]))
	// The listeners are closed when overseer begins to end the program. It then
	// ends the process itself, as soon as no connection is left.
	<-make(chan struct{})
}
