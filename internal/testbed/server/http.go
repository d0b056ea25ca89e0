//go:build linux

package main

import (
	"bytes"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"time"

	"example.com/tableflip/internal/testbed/wire"
)

type flavour int

const (
	plain flavour = iota
	cleartextHTTP2
	withTLS
)

func newHTTP(upg *upgrader, cfg config, ln net.Listener, kind flavour) (service, error) {
	srv := &http.Server{
		Handler:           handler(),
		ReadHeaderTimeout: 20 * time.Second,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	}
	switch kind {
	case cleartextHTTP2:
		srv.Protocols = new(http.Protocols)
		srv.Protocols.SetUnencryptedHTTP2(true)
	case withTLS:
		cert, err := tls.LoadX509KeyPair(cfg.cert, cfg.key)
		if err != nil {
			return nil, err
		}
		srv.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}}
	}
	return newHTTPService(upg, srv, ln, cfg), nil
}

// handler answers POST with the request's body, and GET with what the query asks
// for: "n" bytes of content "id", in "pieces" pieces that are "gap" apart. It answers gRPC
// calls, too.
func handler() http.Handler {
	mux := http.NewServeMux()
	handleGRPC(mux)
	mux.HandleFunc("POST /", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set(wire.VersionHeader, version)
		w.Write(body)
	})
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Query()
		id, _ := strconv.ParseUint(query.Get("id"), 10, 64)
		n, _ := strconv.Atoi(query.Get("n"))
		pieces, _ := strconv.Atoi(query.Get("pieces"))
		gap, _ := time.ParseDuration(query.Get("gap"))
		content := wire.Content(id, n)
		w.Header().Set(wire.VersionHeader, version)
		if pieces < 2 {
			w.Write(content)
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(n))
		rest := bytes.NewBuffer(content)
		for size := n/pieces + 1; rest.Len() > 0; {
			if _, err := w.Write(rest.Next(size)); err != nil {
				return
			}
			http.NewResponseController(w).Flush()
			time.Sleep(gap)
		}
	})
	return mux
}
