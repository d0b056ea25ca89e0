// Command ours is the README's program: package service, which upgrades by
// this library and drains by httpdrain. IdleGrace is shorter than by default.
package main

import (
	"flag"
	"log"
	"log/slog"

	"example.com/tableflip"
	"example.com/tableflip/benchmarks/servers/answer"
	"example.com/tableflip/service"
)

func main() {
	flag.Parse()
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	options := service.Options{DrainTimeout: *answer.Drain, IdleGrace: *answer.IdleGrace, Logger: slog.New(slog.DiscardHandler)}
	if err := service.Run(upg, options, service.HTTP(answer.Plain()), service.HTTP(answer.TLS())); err != nil {
		log.Println(err)
	}
}
