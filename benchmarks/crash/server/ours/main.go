// Command ours is the README's program: package service.
package main

import (
	"flag"
	"log"

	"example.com/tableflip"
	"example.com/tableflip/benchmarks/crash/server"
	"example.com/tableflip/service"
)

func main() {
	trial := flag.Duration("trial", 0, "how long a new process serves beside the old one before it is in charge")
	flag.Parse()
	upg, err := tableflip.New(tableflip.Options{PIDFile: *server.PIDFile, Trial: *trial})
	if err != nil {
		log.Fatal(err)
	}
	if err := service.Run(upgrader{upg}, service.Options{}, service.HTTP(server.New())); err != nil {
		log.Fatal(err)
	}
}

type upgrader struct{ *tableflip.Upgrader }

func (u upgrader) Ready() error {
	err := u.Upgrader.Ready()
	if err == nil {
		server.Ready()
	}
	return err
}
