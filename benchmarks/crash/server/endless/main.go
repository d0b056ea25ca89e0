// Command endless is the pattern that github.com/fvbock/endless documents for a PID file.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"

	"example.com/tableflip/benchmarks/crash/server"
	"github.com/fvbock/endless"
)

func main() {
	flag.Parse()
	s := server.New()
	e := endless.NewServer(s.Addr, s.Handler)
	e.BeforeBegin = func(string) {
		if *server.PIDFile != "" {
			if err := os.WriteFile(*server.PIDFile, fmt.Appendln(nil, os.Getpid()), 0o644); err != nil {
				log.Fatal(err)
			}
		}
		server.Ready()
	}
	log.Println(e.ListenAndServe())
}
