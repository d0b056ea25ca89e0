package control_test

import (
	"context"
	"expvar"
	"flag"
	"log"
	"log/slog"
	"net/http"
	"os"

	"example.com/tableflip"
	"example.com/tableflip/control"
	"example.com/tableflip/httpdrain"
)

// A service with a control socket, which is its own client: "web -ctl upgrade". Package
// service does all of this.
func Example() {
	ask := flag.String("ctl", "", "ask the service that runs: upgrade, status, …")
	flag.Parse()
	const socket = "/run/web.ctl"
	if *ask != "" {
		os.Exit(control.Main("-s", socket, *ask))
	}

	upg, err := tableflip.New(tableflip.Options{Logger: slog.Default()})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()
	ln, err := upg.Listen("tcp", ":8080")
	if err != nil {
		log.Fatal(err)
	}
	drainer := httpdrain.New(&http.Server{})
	ctl, err := control.New(upg, socket, control.Options{
		Connections: func() int { return drainer.Progress().Connections },
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	go ctl.Serve()
	go drainer.Serve(ln)

	<-upg.Exit()
	drainer.Replaced = upg.Replaced()
	err = drainer.Shutdown(context.Background())
	ctl.Close()
	if err != nil {
		log.Fatal(err)
	}
}

// The counters as a variable of package expvar, which serves it at /debug/vars of
// http.DefaultServeMux. The client of Prometheus takes functions, too:
//
//	counter := func(name, help string, value func(control.Counters) float64) {
//		prometheus.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help},
//			func() float64 { return value(ctl.Counters()) }))
//	}
//	counter("tableflip_upgrades_total", "Upgrades that have succeeded.",
//		func(c control.Counters) float64 { return float64(c.Upgrades) })
//	counter("tableflip_drain_seconds_total", "Time that replaced processes took to drain.",
//		func(c control.Counters) float64 { return c.DrainSeconds })
func ExampleServer_Counters() {
	var ctl *control.Server // from New
	expvar.Publish("tableflip", expvar.Func(func() any { return ctl.Counters() }))
	if err := http.ListenAndServe("localhost:6060", nil); err != nil {
		log.Fatal(err)
	}
}
