package supervise_test

import (
	"log"
	"log/slog"
	"net/http"
	"os"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
	"example.com/tableflip/supervise"
)

// A program for a container that holds nothing else. Its process 1 stays, and takes
// SIGHUP for the server to be upgraded.
func ExampleSelf() {
	if err := supervise.Self(); err != nil {
		log.Fatal(err)
	}
	// From here on this is a generation of the service.
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if err := service.Run(upg, service.Options{}, service.HTTP(&http.Server{Addr: ":8080"})); err != nil {
		log.Fatal(err)
	}
}

func ExampleSupervisor_Run() {
	status, err := supervise.Supervisor{
		Command:     []string{"/usr/bin/server", "-listen", ":8080"},
		StopTimeout: 10 * time.Second,
		Logger:      slog.Default(),
	}.Run()
	if err != nil {
		log.Print(err)
	}
	os.Exit(status)
}
