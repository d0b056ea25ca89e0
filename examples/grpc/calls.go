package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
)

// This file owns what is called. Its streams end when they are to, and only they.

// A server is grpc.testing.TestService. Methods that it lacks are not implemented.
type server struct {
	pb.UnimplementedTestServiceServer
	grpc   *grpc.Server
	door   *door
	checks *health.Server

	leaving    context.Context // done once endless streams are to end
	endStreams context.CancelFunc
}

func newServer(d *door) *server {
	s := &server{door: d, checks: health.NewServer()}
	s.leaving, s.endStreams = context.WithCancel(context.Background())
	s.grpc = grpc.NewServer(
		grpc.Creds(d),
		// GracefulStop waits for connections that have not said anything.
		grpc.ConnectionTimeout(5*time.Second),
	)
	pb.RegisterTestServiceServer(s.grpc, s)
	healthpb.RegisterHealthServer(s.grpc, healthServer{s.checks, s.leaving})
	return s
}

// errLeaving ends a stream of which nothing is lost. It is not UNAVAILABLE, as that
// is also what clients get if the connection breaks.
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
