// Command endless is the pattern that github.com/fvbock/endless documents: its
// functions take the place of net/http's. Its "hammer time" is as short as the drain
// of the others.
package main

import (
	"flag"
	"log"
	"sync"

	"example.com/tableflip/benchmarks/servers/answer"
	"github.com/fvbock/endless"
)

func main() {
	flag.Parse()
	endless.DefaultHammerTime = *answer.Drain
	var wait sync.WaitGroup
	wait.Go(func() { log.Println(endless.ListenAndServe(*answer.PlainAddr, answer.Handler)) })
	wait.Go(func() {
		log.Println(endless.ListenAndServeTLS(*answer.TLSAddr, *answer.CertFile, *answer.KeyFile, answer.Handler))
	})
	wait.Wait()
}
