package service_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
)

// A whole service: SIGHUP upgrades it, SIGTERM and Ctrl-C stop it. Where there are no
// upgrades, as on Windows, it serves without.
func Example() {
	upg, err := tableflip.New(tableflip.Options{PIDFile: "/run/service.pid"})
	if err != nil && !errors.Is(err, tableflip.ErrNotSupported) {
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

// A line server, whose connections stay with the process that has accepted them. Serve
// returns when the listener is closed and they have ended, which is its drain.
func ExampleStream() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	serve := func(ln net.Listener) error {
		var connections sync.WaitGroup
		defer connections.Wait()
		for {
			conn, err := ln.Accept()
			if err != nil {
				return err
			}
			connections.Go(func() {
				defer conn.Close()
				io.Copy(conn, conn)
			})
		}
	}
	if err := service.Run(upg, service.Options{}, service.Stream("tcp", ":7", serve, nil)); err != nil {
		log.Fatal(err)
	}
}

// Jobs at certain times, which no two processes must do.
func ExampleBackground() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	jobs := func(ctx context.Context) error {
		for tick := time.NewTicker(time.Hour); ; {
			select {
			case <-tick.C:
				log.Print("a job")
			case <-ctx.Done():
				return nil
			}
		}
	}
	server := &http.Server{Addr: ":8080"}
	// The jobs pause after an upgrade until the old process has drained.
	opts := service.Options{DrainTimeout: 10 * time.Second}
	if err := service.Run(upg, opts, service.HTTP(server), service.Background(jobs)); err != nil {
		log.Fatal(err)
	}
}
