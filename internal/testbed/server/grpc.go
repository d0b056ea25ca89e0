//go:build linux

package main

import (
	"context"
	"io"
	"net/http"

	"google.golang.org/grpc"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"

	"example.com/tableflip/internal/testbed/wire"
)

// handleGRPC has the mux answer gRPC calls with what they send.
func handleGRPC(mux *http.ServeMux) {
	srv := grpc.NewServer()
	pb.RegisterTestServiceServer(srv, calls{})
	mux.Handle("POST /grpc.testing.TestService/", srv)
}

type calls struct {
	pb.UnimplementedTestServiceServer
}

func (calls) UnaryCall(ctx context.Context, in *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	grpc.SetHeader(ctx, metadata.Pairs(wire.VersionHeader, version))
	return &pb.SimpleResponse{Payload: in.GetPayload()}, nil
}

func (calls) FullDuplexCall(stream grpc.BidiStreamingServer[pb.StreamingOutputCallRequest, pb.StreamingOutputCallResponse]) error {
	stream.SetHeader(metadata.Pairs(wire.VersionHeader, version))
	for {
		in, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = stream.Send(&pb.StreamingOutputCallResponse{Payload: in.GetPayload()})
		}
		if err != nil {
			return err
		}
	}
}
