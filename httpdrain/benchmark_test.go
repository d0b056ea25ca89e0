package httpdrain_test

import (
	"io"
	"net"
	"net/http"
	"testing"

	"example.com/tableflip/httpdrain"
)

// What a request costs while nobody drains: the bare server's time and
// allocations, and those with a Drainer.
func BenchmarkRequest(b *testing.B) {
	for _, protocol := range []string{"HTTP/1", "HTTP/2"} {
		for _, drained := range []bool{false, true} {
			name := protocol + "/bare"
			if drained {
				name = protocol + "/httpdrain"
			}
			b.Run(name, func(b *testing.B) {
				srv := &http.Server{Handler: http.HandlerFunc(hello), Protocols: new(http.Protocols)}
				srv.Protocols.SetHTTP1(true)
				srv.Protocols.SetUnencryptedHTTP2(true)
				ln := listenTCP(b)
				if drained {
					ln = httpdrain.New(srv).Listener(ln)
				}
				go srv.Serve(ln)
				defer srv.Close()
				if protocol == "HTTP/1" {
					requestOverHTTP1(b, ln.Addr().String())
				} else {
					requestOverHTTP2(b, "http://"+ln.Addr().String())
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

func requestOverHTTP2(b *testing.B, url string) {
	transport := plainHTTP2Transport()
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
