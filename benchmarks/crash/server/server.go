// Package server is what the servers that crash have in common.
package server

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"time"
)

// crashAfter is how long after Ready this version crashes. It is set by -ldflags -X, and
// empty in a version that does not.
var crashAfter string

var (
	Addr    = flag.String("addr", "", "`address` for HTTP")
	PIDFile = flag.String("pid-file", "", "`file` for the process ID")
	crashes = flag.String("crashes", "", "`file` for the process ID and the time of each crash")
)

// New returns what each process serves: it reads the request's body to its end, and
// answers with the PID and with whether this version crashes.
func New() *http.Server {
	return &http.Server{Addr: *Addr, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintln(w, os.Getpid(), crashAfter != "")
	})}
}

// Ready is called when the process is ready.
func Ready() {
	if crashAfter == "" {
		return
	}
	after, err := time.ParseDuration(crashAfter)
	if err != nil {
		log.Fatal(err)
	}
	time.AfterFunc(after, func() {
		file, err := os.OpenFile(*crashes, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Fprintln(file, os.Getpid(), time.Now().UnixNano())
		os.Exit(2)
	})
}

// Shutdown drains s for as long as tableflip's documentation has it.
func Shutdown(s *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s.Shutdown(ctx)
}
