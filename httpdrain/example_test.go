package httpdrain_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"

	"example.com/tableflip/httpdrain"
)

func Example() {
	ln, err := net.Listen("tcp", "127.0.0.1:0") // or upg.Listen
	if err != nil {
		log.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "hello")
	})}
	d := httpdrain.New(srv)
	go func() {
		if err := d.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			log.Fatal(err)
		}
	}()

	response, err := http.Get("http://" + ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	body, _ := io.ReadAll(response.Body)
	response.Body.Close()
	fmt.Printf("%s\n", body)
	http.DefaultClient.CloseIdleConnections()

	// <-upg.Exit(), or a SIGTERM
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err = d.Shutdown(ctx)
	var cut *httpdrain.CutError
	switch {
	case errors.As(err, &cut):
		fmt.Println("connections cut:", cut.Connections)
	case err != nil:
		log.Print(err)
	default:
		fmt.Println("drained")
	}
	// Output:
	// hello
	// drained
}

// Server-sent events go on for as long as their client listens. The handler ends
// them when the drain begins, and the client reconnects to the successor.
func ExampleDrainer_Context() {
	srv := new(http.Server)
	d := httpdrain.New(srv)
	srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, "data: hello\n\n")
		http.NewResponseController(w).Flush()
		select {
		case <-r.Context().Done():
		case <-d.Context().Done():
			io.WriteString(w, "data: goodbye\n\n")
		}
	})
	// What Server.RegisterOnShutdown would call too late.
	context.AfterFunc(d.Context(), func() {
		// Tell the WebSocket clients to leave.
	})

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go d.Serve(ln)
	client := &http.Client{Transport: new(http.Transport)}
	response, err := client.Get("http://" + ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	drained := make(chan error)
	go func() { drained <- d.Shutdown(context.Background()) }()
	events, _ := io.ReadAll(response.Body)
	fmt.Printf("%s", events)
	client.CloseIdleConnections()
	fmt.Println(<-drained)
	// Output:
	// data: hello
	//
	// data: goodbye
	//
	// <nil>
}

// Several servers have a Drainer each, and drain at the same time.
func ExampleDrainer_Shutdown_severalServers() {
	api := httpdrain.New(&http.Server{Addr: "api"})
	metrics := httpdrain.New(&http.Server{Addr: "metrics"})

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for _, d := range []*httpdrain.Drainer{api, metrics} {
		wg.Go(func() {
			if err := d.Shutdown(ctx); err != nil {
				log.Print(err)
			}
		})
	}
	wg.Wait()
	fmt.Println("drained")
	// Output: drained
}
