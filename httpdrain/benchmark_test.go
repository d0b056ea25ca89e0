package httpdrain_test

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"example.com/tableflip/httpdrain"
)

// What a request costs while nobody drains: the bare server's time and
// allocations, and those with a Drainer.
func BenchmarkRequest(b *testing.B) {
	for _, protocol := range []string{"HTTP/1", "HTTP/1 beside h2c", "h2c", "HTTP/2"} {
		for _, drained := range []bool{false, true} {
			name := protocol + "/bare"
			if drained {
				name = protocol + "/httpdrain"
			}
			b.Run(name, func(b *testing.B) {
				srv := &http.Server{
					Handler:   http.HandlerFunc(hello),
					TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate()}},
					Protocols: new(http.Protocols),
				}
				srv.Protocols.SetHTTP1(true)
				srv.Protocols.SetHTTP2(true)
				srv.Protocols.SetUnencryptedHTTP2(strings.HasSuffix(protocol, "h2c"))
				serve, serveTLS := srv.Serve, srv.ServeTLS
				if drained {
					d := httpdrain.New(srv)
					serve, serveTLS = d.Serve, d.ServeTLS
				}
				ln := listenTCP(b)
				defer srv.Close()
				switch addr := ln.Addr().String(); protocol {
				case "HTTP/2":
					go serveTLS(ln, "", "")
					requestOverHTTP2(b, http2Transport(), "https://"+addr)
				case "h2c":
					go serve(ln)
					requestOverHTTP2(b, plainHTTP2Transport(), "http://"+addr)
				default:
					go serve(ln)
					requestOverHTTP1(b, addr)
				}
			})
		}
	}
}

// requestOverHTTP1 allocates nothing itself.
func requestOverHTTP1(b *testing.B, addr string) {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer nc.Close()
	request, response := []byte(get("/")), make([]byte, 1000)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := nc.Write(request); err != nil {
			b.Fatal(err)
		}
		// The response fits into a segment.
		if _, err := nc.Read(response); err != nil {
			b.Fatal(err)
		}
	}
}

func requestOverHTTP2(b *testing.B, transport *http.Transport, url string) {
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(b.Context(), "GET", url, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		response, err := transport.RoundTrip(request)
		if err != nil {
			b.Fatal(err)
		}
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
	}
}
