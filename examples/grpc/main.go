// JavaScript and WASI have no SIGHUP.

//go:build !js && !wasip1

// Command grpc is a gRPC server that is upgraded while calls are in progress.
//
// Flags and signals are those of the http example. The service is
// grpc.testing.TestService, which comes with grpc-go, so that nothing has to be
// generated: put your own in the place of the methods of server.
//
// What is promised, when an upgrade replaces the process:
//
//   - No connection is refused or reset. Its client is told to open no more calls on
//     it (GOAWAY), and is answered all that it has sent by then.
//   - Unary calls, and uploads (UnaryCall, StreamingInputCall), are served to their
//     end.
//   - A stream that would go on for ever (StreamingOutputCall, FullDuplexCall) is
//     ended between two messages, with the status ABORTED. A message that the client
//     has sent and that has no answer by then has not been processed, and can be sent
//     again on a new stream.
//   - A health check (Watch) is ended with CANCELLED, and never hears NOT_SERVING:
//     the service does serve.
//
// SIGTERM and SIGINT do the same, except that health checks hear NOT_SERVING
// first, and that there is nobody to serve connections that come, or wait in the
// listener's queue.
//
// What is not: calls that are still in progress when -drain has passed are cut off.
// Their clients get UNAVAILABLE, and cannot know what was processed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"example.com/tableflip"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8080", "TCP `address` to serve on")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	deadline := flag.Duration("drain", 30*time.Second, "how long calls may take to end before the process exits")
	flag.Parse()

	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))
	err := run(*listen, *pidFile, *deadline)
	if err != nil && !errors.Is(err, tableflip.ErrStopped) {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

// run returns when the service has been drained. An ErrStopped means that it was
// stopped before it served.
func run(listen, pidFile string, deadline time.Duration) error {
	// Before all else: until then these signals end the process. There are two
	// channels so that no number of the one keeps out the other.
	hangup, terminate := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	signal.Notify(terminate, syscall.SIGTERM, os.Interrupt)

	upg, err := tableflip.New(tableflip.Options{PIDFile: pidFile, Logger: slog.Default()})
	if err != nil {
		return err
	}
	checks := health.NewServer()
	var handlers sync.WaitGroup
	defer handlers.Wait()
	defer upg.Stop()
	handlers.Go(func() { handleSignals(upg, checks, hangup, terminate) })

	ln, err := upg.Listen("tcp", listen)
	if err != nil {
		return err
	}
	slog.Info("listening", "addr", ln.Addr().String(), "upgraded", upg.HasParent())

	// Calls come after Ready: what a process accepts is lost if its parent refuses
	// it. Until then connections wait in the listener's queue, or are served by the
	// parent.
	if err := upg.Ready(); err != nil {
		return err
	}
	slog.Info("ready")

	srv := newServer(ln, insecure.NewCredentials(), checks)
	served := make(chan error, 1)
	go func() { served <- srv.grpc.Serve(srv.door) }()
	select {
	case err := <-served:
		return err
	case <-upg.Exit():
	}
	// The successor accepts from the same queue, so that whoever is not accepted
	// here is accepted there.
	ln.Close()
	<-served
	return srv.drain(deadline)
}

// handleSignals returns once the process is to drain and no upgrade is under way.
func handleSignals(upg *tableflip.Upgrader, checks *health.Server, hangup, terminate <-chan os.Signal) {
	var upgrades sync.WaitGroup
	defer upgrades.Wait()
	for {
		select {
		case <-hangup:
			// Not here, so that the service can be stopped meanwhile.
			upgrades.Go(func() { upgrade(upg) })
		case sig := <-terminate:
			slog.Info("stopping", "signal", sig.String())
			if sig == os.Interrupt {
				signal.Reset(os.Interrupt)
			}
			// Load balancers that poll need a pause between the two.
			checks.Shutdown()
			upg.Stop()
		case <-upg.Exit():
			go heedInterrupts(terminate)
			return
		}
	}
}

// heedInterrupts has the second SIGINT end a process that drains, whether it was
// stopped or replaced. Any number of SIGTERMs is one: supervisors send several.
func heedInterrupts(terminate <-chan os.Signal) {
	for sig := range terminate {
		if sig == os.Interrupt {
			signal.Reset(os.Interrupt)
		}
	}
}

func upgrade(upg *tableflip.Upgrader) {
	began := time.Now()
	if err := upg.Upgrade(); err != nil {
		slog.Error("upgrade failed", "error", err)
		return
	}
	slog.Info("upgrade succeeded", "took", time.Since(began))
}

// A server is grpc.testing.TestService. Methods that it lacks are not implemented.
type server struct {
	pb.UnimplementedTestServiceServer
	grpc *grpc.Server
	door *door

	leaving context.Context // done once endless streams are to end
	endAll  context.CancelFunc
}

func newServer(ln net.Listener, security credentials.TransportCredentials, checks *health.Server) *server {
	s := &server{door: &door{Listener: ln, TransportCredentials: security}}
	s.leaving, s.endAll = context.WithCancel(context.Background())
	s.grpc = grpc.NewServer(
		grpc.Creds(s.door),
		// GracefulStop and Stop wait for connections that have not said anything.
		grpc.ConnectionTimeout(5*time.Second),
	)
	pb.RegisterTestServiceServer(s.grpc, s)
	healthpb.RegisterHealthServer(s.grpc, healthServer{checks, s.leaving})
	return s
}

// A door is the listener and the security of a server. It counts the connections
// that have been accepted and that the server has not begun to serve: these it
// would close without a word once GracefulStop has been called.
type door struct {
	net.Listener
	credentials.TransportCredentials
	entering sync.WaitGroup
}

func (d *door) Accept() (net.Conn, error) {
	conn, err := d.Listener.Accept()
	if err == nil {
		d.entering.Add(1)
	}
	return conn, err
}

// ServerHandshake is the first that the server calls with a connection.
func (d *door) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	d.entering.Done()
	return d.TransportCredentials.ServerHandshake(conn)
}

// headStart is the time for clients to get the GOAWAY before their streams end. Without
// it they would open the next streams on the old connection, and lose nothing by that.
const headStart = 100 * time.Millisecond

// drain has the calls in progress end, and returns when they have, or when it has
// cut off those that have not before the deadline, which is an error. Serve must
// have returned.
func (s *server) drain(deadline time.Duration) error {
	slog.Info("draining", "deadline", deadline)
	began := time.Now()
	s.door.entering.Wait()
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		s.grpc.GracefulStop()
	}()
	defer time.AfterFunc(headStart, s.endAll).Stop()
	select {
	case <-drained:
	case <-time.After(deadline):
		s.grpc.Stop()
		return fmt.Errorf("calls did not end in %v and were cut off", deadline)
	}
	slog.Info("drained", "took", time.Since(began))
	return nil
}

// errLeaving ends a stream of which nothing is lost. It is not UNAVAILABLE, because
// clients also get that if the connection breaks.
var errLeaving = status.Error(codes.Aborted, "the server is about to exit: continue on a new stream")

// answer returns its argument with the name of this process before it.
func answer(to []byte) *pb.Payload {
	return &pb.Payload{Body: fmt.Appendf(nil, "version=%s pid=%d %s", version, os.Getpid(), to)}
}

// UnaryCall answers one message.
func (s *server) UnaryCall(_ context.Context, in *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	return &pb.SimpleResponse{Payload: answer(in.GetPayload().GetBody())}, nil
}

// StreamingInputCall counts the bytes of an upload.
func (s *server) StreamingInputCall(stream grpc.ClientStreamingServer[pb.StreamingInputCallRequest, pb.StreamingInputCallResponse]) error {
	size := 0
	for {
		in, err := stream.Recv()
		if err == io.EOF {
			return stream.SendAndClose(&pb.StreamingInputCallResponse{AggregatedPayloadSize: int32(size)})
		}
		if err != nil {
			return err
		}
		size += len(in.GetPayload().GetBody())
	}
}

// tick is the time between two messages of a subscription.
const tick = 10 * time.Millisecond

// StreamingOutputCall is a subscription: it counts from the number that the client
// has sent, until the client leaves or is told to.
func (s *server) StreamingOutputCall(in *pb.StreamingOutputCallRequest, stream grpc.ServerStreamingServer[pb.StreamingOutputCallResponse]) error {
	n, err := strconv.Atoi(string(in.GetPayload().GetBody()))
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	next := time.NewTicker(tick)
	defer next.Stop()
	for ; ; n++ {
		if err := stream.Send(&pb.StreamingOutputCallResponse{Payload: answer(strconv.AppendInt(nil, int64(n), 10))}); err != nil {
			return err
		}
		select {
		case <-next.C:
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-s.leaving.Done():
			return errLeaving
		}
	}
}

// FullDuplexCall answers each message, until the client has no more or is told to
// leave.
func (s *server) FullDuplexCall(stream grpc.BidiStreamingServer[pb.StreamingOutputCallRequest, pb.StreamingOutputCallResponse]) error {
	// Recv cannot be interrupted, except by returning.
	messages, failed := make(chan *pb.StreamingOutputCallRequest), make(chan error, 1)
	go func() {
		for {
			in, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case messages <- in:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	for {
		select {
		case in := <-messages:
			if err := stream.Send(&pb.StreamingOutputCallResponse{Payload: answer(in.GetPayload().GetBody())}); err != nil {
				return err
			}
		case err := <-failed:
			if err == io.EOF {
				return nil
			}
			return err
		case <-s.leaving.Done():
			return errLeaving
		}
	}
}

// A healthServer is one whose Watch ends when streams are to end.
type healthServer struct {
	*health.Server
	leaving context.Context
}

func (h healthServer) Watch(in *healthpb.HealthCheckRequest, stream healthpb.Health_WatchServer) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(h.leaving, cancel)()
	return h.Server.Watch(in, watchStream{stream, ctx})
}

type watchStream struct {
	healthpb.Health_WatchServer
	ctx context.Context
}

func (w watchStream) Context() context.Context { return w.ctx }
