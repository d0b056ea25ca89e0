// Command web is the service of the recipes in this directory.
package main

import (
	"flag"
	"io"
	"log"
	"net/http"

	"example.com/tableflip"
	"example.com/tableflip/service"
)

func main() {
	listen := flag.String("listen", ":8080", "`address` to serve on, or the path of a Unix socket")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	delay := flag.Duration("delay", 0, "how long to serve on after SIGTERM, until the load balancer has looked away")
	grace := flag.Duration("grace", 0, "how long a connection must have been silent until a drain closes it")
	flag.Parse()

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile})
	if err != nil {
		log.Fatal(err)
	}
	health := new(service.Health)
	mux := http.NewServeMux()
	mux.Handle("/health", health)
	mux.HandleFunc("/", echo)
	err = service.Run(upg, service.Options{DrainDelay: *delay, Health: health, IdleGrace: *grace},
		service.HTTP(&http.Server{Addr: *listen, Handler: mux}))
	if err != nil {
		log.Fatal(err)
	}
}

func echo(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) }
