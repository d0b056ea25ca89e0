// Package grpctest tests package httpdrain with the client and the server of grpc-go,
// in a module of its own because package tableflip does not depend on them.
package grpctest

import (
	"context"
	"errors"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/tableflip/httpdrain"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	pb "google.golang.org/grpc/interop/grpc_testing"
)

// server is the gRPC service. Calls take as long as delay says, and streams echo.
type server struct {
	pb.UnimplementedTestServiceServer
	delay func() time.Duration
}

func (s *server) UnaryCall(_ context.Context, r *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	time.Sleep(s.delay()) // in a bubble's time, as in all of this file
	return &pb.SimpleResponse{Payload: r.Payload}, nil
}

func (s *server) FullDuplexCall(stream grpc.BidiStreamingServer[pb.StreamingOutputCallRequest, pb.StreamingOutputCallResponse]) error {
	for {
		r, err := stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := stream.Send(&pb.StreamingOutputCallResponse{Payload: r.Payload}); err != nil {
			return err
		}
	}
}

// A generation is what one process would be.
type generation struct {
	*httpdrain.Drainer
	conns  chan net.Conn
	closed chan struct{}
}

func start(t *testing.T, delay func() time.Duration) *generation {
	s := grpc.NewServer()
	pb.RegisterTestServiceServer(s, &server{delay: delay})
	srv := &http.Server{
		Handler:      s,
		ErrorLog:     log.New(io.Discard, "", 0),
		Protocols:    new(http.Protocols),
		WriteTimeout: 10 * time.Second,
	}
	srv.Protocols.SetUnencryptedHTTP2(true)
	g := &generation{httpdrain.New(srv), make(chan net.Conn), make(chan struct{})}
	go func() {
		if err := g.Serve(g); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	return g
}

func (g *generation) Accept() (net.Conn, error) {
	select {
	case nc := <-g.conns:
		return nc, nil
	case <-g.closed:
		return nil, net.ErrClosed
	}
}

func (g *generation) Close() error   { close(g.closed); return nil }
func (g *generation) Addr() net.Addr { return new(net.TCPAddr) }

// dial returns a connection to the generation on which everything takes half of rtt.
func (g *generation) dial(rtt time.Duration) (net.Conn, error) {
	client, near := net.Pipe()
	far, server := net.Pipe()
	select {
	case g.conns <- server:
	case <-g.closed:
		return nil, errors.New("connection refused")
	}
	for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
		pieces := make(chan func() error, 10000)
		go func() {
			defer close(pieces)
			for {
				buf := make([]byte, 16<<10)
				n, err := way[0].Read(buf)
				due := time.Now().Add(rtt / 2)
				pieces <- func() error {
					time.Sleep(time.Until(due))
					if err != nil {
						return err
					}
					_, err := way[1].Write(buf[:n])
					return err
				}
				if err != nil {
					return
				}
			}
		}()
		go func() {
			for deliver := range pieces {
				if deliver() != nil {
					break
				}
			}
			way[0].Close()
			way[1].Close()
			for range pieces {
			}
		}()
	}
	return client, nil
}

// Calls that have deadlines succeed, and streams go on, while the service is replaced
// again and again. The clock stands still while anybody computes.
func TestCalls(t *testing.T) {
	for _, test := range []struct{ rtt, deadline time.Duration }{
		{0, 200 * time.Millisecond},
		{2 * time.Millisecond, 200 * time.Millisecond},
		{50 * time.Millisecond, 200 * time.Millisecond},
		{150 * time.Millisecond, 400 * time.Millisecond}, // a new connection takes a round trip, too
	} {
		synctest.Test(t, func(t *testing.T) {
			limit := test.deadline - 2*test.rtt - 2*time.Millisecond
			delay := func() time.Duration {
				switch rand.N(3) {
				case 0:
					return rand.N(limit)
				case 1:
					return limit - rand.N(15*time.Millisecond)
				}
				return 0
			}
			var current atomic.Pointer[generation]
			current.Store(start(t, delay))
			var calls, failed atomic.Int64
			var stop atomic.Bool
			var clients sync.WaitGroup
			for range 3 {
				client, err := grpc.NewClient("passthrough:///service",
					grpc.WithTransportCredentials(insecure.NewCredentials()),
					grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
						return current.Load().dial(test.rtt)
					}))
				if err != nil {
					t.Fatal(err)
				}
				service := pb.NewTestServiceClient(client)
				var busy sync.WaitGroup
				for range 20 {
					busy.Go(func() {
						for !stop.Load() {
							ctx, cancel := context.WithTimeout(t.Context(), test.deadline)
							_, err := service.UnaryCall(ctx, new(pb.SimpleRequest))
							cancel()
							if calls.Add(1); err != nil && failed.Add(1) < 4 {
								t.Error(err)
							}
						}
					})
				}
				busy.Go(func() {
					for !stop.Load() {
						if err := converse(t.Context(), service); err != nil {
							t.Errorf("a stream: %v", err)
						}
					}
				})
				clients.Go(func() {
					busy.Wait()
					client.Close()
				})
			}
			time.Sleep(500 * time.Millisecond)
			for range 5 {
				last := current.Load()
				current.Store(start(t, delay))
				if err := last.Shutdown(t.Context()); err != nil {
					t.Error(err)
				}
				time.Sleep(500 * time.Millisecond)
			}
			stop.Store(true)
			clients.Wait()
			time.Sleep(time.Second) // for what is on the way
			current.Load().IdleGrace = -1
			if err := current.Load().Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			t.Logf("round trip %v: %d calls, %d failed", test.rtt, calls.Load(), failed.Load())
		})
	}
}

// converse exchanges ten messages in the time of several drains.
func converse(ctx context.Context, service pb.TestServiceClient) error {
	stream, err := service.FullDuplexCall(ctx)
	if err != nil {
		return err
	}
	for range 10 {
		if err := stream.Send(new(pb.StreamingOutputCallRequest)); err != nil {
			return err
		}
		if _, err := stream.Recv(); err != nil {
			return err
		}
		time.Sleep(rand.N(300 * time.Millisecond))
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err = stream.Recv(); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
