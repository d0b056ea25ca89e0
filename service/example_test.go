package service_test

import (
	"log"
	"net/http"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
)

// A service behind a load balancer that checks /health every few seconds.
func ExampleHealth() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	health := new(service.Health)
	http.Handle("/health", health)
	opts := service.Options{Health: health, DrainDelay: 10 * time.Second}
	if err := service.Run(upg, opts, &http.Server{Addr: ":8080"}); err != nil {
		log.Fatal(err)
	}
}
