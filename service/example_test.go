package service_test

import (
	"crypto/tls"
	"fmt"
	"log"
	"log/slog"
	"net/http"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
)

// A whole service: SIGHUP upgrades it, SIGTERM and Ctrl-C stop it.
func Example() {
	upg, err := tableflip.New(tableflip.Options{PIDFile: "/run/service.pid"})
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Addr: ":8080", Handler: http.FileServer(http.Dir("/srv/www"))}
	if err := service.Run(upg, service.Options{}, service.HTTP(server)); err != nil {
		log.Fatal(err)
	}
}

// Several servers share the process: one with TLS, and one for administrators on a Unix
// socket. They are ready, drained and stopped together.
func ExampleRun_servers() {
	upg, err := tableflip.New(tableflip.Options{Logger: slog.Default()})
	if err != nil {
		log.Fatal(err)
	}
	certificate, err := tls.LoadX509KeyPair("/etc/service/cert.pem", "/etc/service/key.pem")
	if err != nil {
		log.Fatal(err)
	}
	public := &http.Server{
		Addr:              ":443",
		Handler:           http.FileServer(http.Dir("/srv/www")),
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{certificate}},
		ReadHeaderTimeout: 5 * time.Second,
	}
	admin := &http.Server{Addr: "/run/service/admin.sock", Handler: http.DefaultServeMux}
	if err := service.Run(upg, service.Options{}, service.HTTP(public), service.HTTP(admin)); err != nil {
		log.Fatal(err)
	}
}

// A stream ends when the process has been replaced or stopped: its client then connects
// to the new process.
func ExampleRun_streams() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	stream := func(w http.ResponseWriter, r *http.Request) {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case now := <-tick.C:
				fmt.Fprintf(w, "data: %s\n\n", now)
				http.NewResponseController(w).Flush()
			case <-r.Context().Done():
				return
			case <-upg.Exit():
				return
			}
		}
	}
	server := &http.Server{Addr: ":8080", Handler: http.HandlerFunc(stream)}
	if err := service.Run(upg, service.Options{}, service.HTTP(server)); err != nil {
		log.Fatal(err)
	}
}

// A service behind a load balancer that checks /health every few seconds.
func ExampleHealth() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	health := new(service.Health)
	http.Handle("/health", health)
	opts := service.Options{Health: health, DrainDelay: 10 * time.Second}
	if err := service.Run(upg, opts, service.HTTP(&http.Server{Addr: ":8080"})); err != nil {
		log.Fatal(err)
	}
}
