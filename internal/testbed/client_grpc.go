//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"

	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/testbed/wire"
)

// dialGRPC returns a client that repeats nothing that a server may have processed. It
// connects again soon after a crash.
func dialGRPC(addr string, roots *x509.CertPool) (pb.TestServiceClient, error) {
	security := insecure.NewCredentials()
	if roots != nil {
		security = credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: load.CertificateName})
	}
	soon := grpc.ConnectParams{MinConnectTimeout: load.Limit, Backoff: backoff.Config{
		BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond,
	}}
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(security),
		grpc.WithConnectParams(soon), grpc.WithNoProxy(), grpc.WithDisableRetry())
	return pb.NewTestServiceClient(conn), err
}

func payload(content []byte) *pb.Payload { return &pb.Payload{Body: content} }

// checkPayload returns the version that has answered.
func checkPayload(header metadata.MD, got *pb.Payload, want []byte) (version int, err error) {
	if !bytes.Equal(got.GetBody(), want) {
		return 0, mismatch(got.GetBody(), want)
	}
	names := header.Get(wire.VersionHeader)
	if len(names) != 1 {
		return 0, fmt.Errorf("%d versions have answered", len(names))
	}
	return wire.ParseVersion(names[0])
}

// grpcCalls makes unary calls without TLS, which have a deadline.
func (t *target) grpcCalls() load.Exchanger {
	client, err := dialGRPC(t.h2c, nil)
	var mu sync.Mutex
	var last time.Time // end of the last call
	return func(_ context.Context, w *load.Worker, began time.Time) {
		e := load.Exchange{Began: began, Err: err}
		mu.Lock()
		if !last.IsZero() {
			e.Idle = time.Since(last)
		}
		mu.Unlock()
		if err == nil {
			e.By, e.Err = call(client, t.deadline, wire.Content(w.Random.Uint64(), 1+w.Random.IntN(4<<10)))
		}
		e.Latency = time.Since(began)
		mu.Lock()
		last = time.Now()
		mu.Unlock()
		w.Record(e)
	}
}

func call(client pb.TestServiceClient, deadline time.Duration, content []byte) (version int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	var header metadata.MD
	out, err := client.UnaryCall(ctx, &pb.SimpleRequest{Payload: payload(content)}, grpc.Header(&header))
	if err != nil {
		return 0, err
	}
	return checkPayload(header, out.GetPayload(), content)
}

// grpcStreams keeps streams over TLS for up to a second. A stream belongs to the process
// that accepted it until the client ends it.
func (t *target) grpcStreams() load.Exchanger {
	client, err := dialGRPC(t.tls, t.roots)
	return func(ctx context.Context, w *load.Worker, began time.Time) {
		if err != nil {
			w.Record(load.Exchange{Began: began, Err: err})
			return
		}
		t.converse(ctx, w, client, began)
	}
}

// converse records an exchange for each message, which began when the stream had worked
// last.
func (t *target) converse(ctx context.Context, w *load.Worker, client pb.TestServiceClient, good time.Time) {
	end := good.Add(time.Duration(w.Random.Float64() * float64(time.Second)))
	limit, cancel := context.WithTimeout(context.Background(), load.Limit)
	defer cancel()
	stream, err := client.FullDuplexCall(limit)
	for sent := good; ; {
		version := 0
		if err == nil {
			version, err = say(stream, wire.Content(w.Random.Uint64(), 1+w.Random.IntN(2<<10)))
		}
		w.Record(load.Exchange{Began: good, Latency: time.Since(sent), By: version, Err: err})
		if err != nil {
			return
		}
		good = time.Now()
		if good.After(end) || ctx.Err() != nil {
			break
		}
		time.Sleep(load.UpTo(4 * t.pace)(w.Random))
		sent = time.Now()
	}

	// The end is the client's, and clean.
	err = stream.CloseSend()
	if out, endErr := stream.Recv(); err != nil || endErr != io.EOF {
		w.Record(load.Exchange{Began: good, Err: errors.Join(err, endErr, fmt.Errorf("end: %d bytes too many", len(out.GetPayload().GetBody())))})
	}
}

type conversation = grpc.BidiStreamingClient[pb.StreamingOutputCallRequest, pb.StreamingOutputCallResponse]

func say(stream conversation, content []byte) (version int, err error) {
	// The error of a Send is io.EOF if Recv has the status of the stream.
	if err := stream.Send(&pb.StreamingOutputCallRequest{Payload: payload(content)}); err != nil && err != io.EOF {
		return 0, err
	}
	out, err := stream.Recv()
	if err != nil {
		return 0, err
	}
	header, err := stream.Header()
	if err != nil {
		return 0, err
	}
	return checkPayload(header, out.GetPayload(), content)
}
