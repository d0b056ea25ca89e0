//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/exampletest"
	"example.com/tableflip/internal/proctest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
)

func TestMain(m *testing.M) { exampletest.Main(m) }

// dial returns a client that repeats nothing that a server may have processed.
func dial(addr string) (*grpc.ClientConn, error) {
	return grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(), grpc.WithDisableRetry())
}

func payload(body string) *pb.Payload { return &pb.Payload{Body: []byte(body)} }

// checked returns an answer, or an error if it is not that to the message.
func checked(got *pb.Payload, message string) (string, error) {
	answer := string(got.GetBody())
	if !strings.HasSuffix(answer, " "+message) {
		return "", fmt.Errorf("%q was answered by %q", message, answer)
	}
	return answer, nil
}

func ask(conn *grpc.ClientConn, message string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), proctest.Patience)
	defer cancel()
	out, err := pb.NewTestServiceClient(conn).UnaryCall(ctx, &pb.SimpleRequest{Payload: payload(message)})
	if err != nil {
		return "", err
	}
	return checked(out.GetPayload(), message)
}

// passing connects for every call.
func passing(s *exampletest.Service) exampletest.ClientFunc {
	return func() (string, error) {
		conn, err := dial(s.Addr())
		if err != nil {
			return "", err
		}
		defer conn.Close()
		return ask(conn, "hello")
	}
}

// A staying client keeps its connection until it leaves.
type staying struct {
	s    *exampletest.Service
	conn *grpc.ClientConn
	n    int
}

func (st *staying) connect() error {
	if st.conn != nil {
		return nil
	}
	var err error
	st.conn, err = dial(st.s.Addr())
	return err
}

func (st *staying) Leave() error {
	if st.conn == nil {
		return nil
	}
	defer func() { st.conn = nil }()
	return st.conn.Close()
}

// A caller makes unary calls.
type caller struct{ staying }

func (c *caller) Exchange() (string, error) {
	if err := c.connect(); err != nil {
		return "", err
	}
	c.n++
	return ask(c.conn, fmt.Sprint("call ", c.n))
}

// A talker sends messages on one stream until it is ended by the server, and then
// on another.
type talker struct {
	staying
	stream grpc.BidiStreamingClient[pb.StreamingOutputCallRequest, pb.StreamingOutputCallResponse]
	cancel context.CancelFunc
}

func (ta *talker) Exchange() (string, error) {
	if err := ta.connect(); err != nil {
		return "", err
	}
	ta.n++
	message := fmt.Sprint("message ", ta.n)
	for {
		answer, err := ta.send(message)
		if err == nil {
			return checked(answer, message)
		}
		ta.cancel()
		ta.stream = nil
		if status.Code(err) != codes.Aborted {
			return "", err
		}
	}
}

func (ta *talker) send(message string) (*pb.Payload, error) {
	if ta.stream == nil {
		var ctx context.Context
		ctx, ta.cancel = context.WithCancel(context.Background())
		var err error
		if ta.stream, err = pb.NewTestServiceClient(ta.conn).FullDuplexCall(ctx); err != nil {
			return nil, err
		}
	}
	defer time.AfterFunc(proctest.Patience, ta.cancel).Stop()
	// The error of a Send is io.EOF if Recv has the status of the stream.
	if err := ta.stream.Send(&pb.StreamingOutputCallRequest{Payload: payload(message)}); err != nil && err != io.EOF {
		return nil, err
	}
	out, err := ta.stream.Recv()
	return out.GetPayload(), err
}

func (ta *talker) Leave() error {
	if ta.stream == nil {
		return ta.staying.Leave()
	}
	defer ta.cancel()
	err := ta.stream.CloseSend()
	if out, end := ta.stream.Recv(); end != io.EOF && status.Code(end) != codes.Aborted {
		err = errors.Join(err, fmt.Errorf("got %v, %v at the end", out, end))
	}
	ta.stream = nil
	return errors.Join(err, ta.staying.Leave())
}

// A follower reads some messages of a subscription, and goes on where it stopped.
type follower struct{ staying }

func (f *follower) Exchange() (string, error) {
	if err := f.connect(); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), proctest.Patience)
	defer cancel()
	for end := f.n + 3; ; {
		stream, err := subscribe(ctx, f.conn, f.n)
		for err == nil {
			var answer string
			if answer, err = next(stream, f.n); err == nil {
				f.n++
				if f.n == end {
					return answer, nil
				}
			}
		}
		if status.Code(err) != codes.Aborted {
			return "", err
		}
	}
}

func subscribe(ctx context.Context, conn *grpc.ClientConn, from int) (grpc.ServerStreamingClient[pb.StreamingOutputCallResponse], error) {
	return pb.NewTestServiceClient(conn).StreamingOutputCall(ctx, &pb.StreamingOutputCallRequest{Payload: payload(strconv.Itoa(from))})
}

func next(stream grpc.ServerStreamingClient[pb.StreamingOutputCallResponse], want int) (string, error) {
	out, err := stream.Recv()
	if err != nil {
		return "", err
	}
	return checked(out.GetPayload(), strconv.Itoa(want))
}

// clients returns one of each kind, and a second caller.
func clients(s *exampletest.Service) []exampletest.Client {
	c := staying{s: s}
	return []exampletest.Client{passing(s), &caller{c}, &caller{c}, &talker{staying: c}, &follower{c}}
}

func TestUpgradeUnderLoad(t *testing.T) {
	s := exampletest.Start(t)
	s.UpgradeUnderLoad(nil, clients(s)...)
}

func TestSurviveFailures(t *testing.T) {
	s := exampletest.Start(t)
	s.SurviveFailures(clients(s)...)
}

// inProgress is one call of each kind that takes long, on one connection.
type inProgress struct {
	t            *testing.T
	conn         *grpc.ClientConn
	upload       grpc.ClientStreamingClient[pb.StreamingInputCallRequest, pb.StreamingInputCallResponse]
	subscription grpc.ServerStreamingClient[pb.StreamingOutputCallResponse]
	received     int // of the subscription
	conversation grpc.BidiStreamingClient[pb.StreamingOutputCallRequest, pb.StreamingOutputCallResponse]
	watch        grpc.ServerStreamingClient[healthpb.HealthCheckResponse]
}

func connect(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := dial(addr)
	proctest.OK(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// begin returns when the process in charge is serving all of them.
func begin(t *testing.T, s *exampletest.Service) *inProgress {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), proctest.Patience)
	t.Cleanup(cancel)
	p := &inProgress{t: t, conn: connect(t, s.Addr())}
	service := pb.NewTestServiceClient(p.conn)
	must := func(err error) {
		t.Helper()
		proctest.OK(t, err)
	}
	var err error
	p.upload, err = service.StreamingInputCall(ctx)
	must(err)
	must(p.upload.Send(&pb.StreamingInputCallRequest{Payload: payload("12345")}))
	p.subscription, err = subscribe(ctx, p.conn, 0)
	must(err)
	_, err = next(p.subscription, 0)
	must(err)
	p.received++
	p.conversation, err = service.FullDuplexCall(ctx)
	must(err)
	must(p.conversation.Send(&pb.StreamingOutputCallRequest{Payload: payload("one")}))
	out, err := p.conversation.Recv()
	must(err)
	_, err = checked(out.GetPayload(), "one")
	must(err)
	p.watch, err = healthpb.NewHealthClient(p.conn).Watch(ctx, &healthpb.HealthCheckRequest{})
	must(err)
	p.heard(healthpb.HealthCheckResponse_SERVING)
	// This was sent after the upload.
	got, err := ask(p.conn, "two")
	if want := fmt.Sprintf("version=v1 pid=%d two", s.PID()); got != want || err != nil {
		t.Fatalf("got %q, %v, want %q", got, err, want)
	}
	return p
}

func (p *inProgress) heard(want healthpb.HealthCheckResponse_ServingStatus) {
	p.t.Helper()
	if health, err := p.watch.Recv(); err != nil || health.GetStatus() != want {
		p.t.Fatalf("got %v, %v from Watch, want %v", health, err, want)
	}
}

// awaitEnd waits until the server has ended all but the upload.
func (p *inProgress) awaitEnd() {
	p.t.Helper()
	var err error
	for ; err == nil; p.received++ {
		_, err = next(p.subscription, p.received)
	}
	if status.Code(err) != codes.Aborted {
		p.t.Errorf("the subscription ended with %v", err)
	}
	if out, err := p.conversation.Recv(); status.Code(err) != codes.Aborted {
		p.t.Errorf("got %v, %v from the conversation", out, err)
	}
	if health, err := p.watch.Recv(); status.Code(err) != codes.Canceled {
		p.t.Errorf("got %v, %v from Watch", health, err)
	}
}

func (p *inProgress) finishUpload() {
	p.t.Helper()
	if err := p.upload.Send(&pb.StreamingInputCallRequest{Payload: payload("678")}); err != nil {
		p.t.Fatal(err)
	}
	got, err := p.upload.CloseAndRecv()
	if err != nil || got.GetAggregatedPayloadSize() != 8 {
		p.t.Errorf("got %v, %v for an upload of 8 bytes", got, err)
	}
}

func TestCallsOutliveUpgrade(t *testing.T) {
	s := exampletest.Start(t)
	p := begin(t, s)
	s.Install("v2")
	old, inCharge := s.Upgrade()
	p.awaitEnd()
	// The streams have been ended after the GOAWAY.
	got, err := ask(p.conn, "three")
	if want := fmt.Sprintf("version=v2 pid=%d three", inCharge); got != want || err != nil {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	p.finishUpload()
	s.AwaitEnd(old, 0)
	s.Await(old, "drained")
	s.Stop()
}

func TestStopDrains(t *testing.T) {
	s := exampletest.Start(t)
	p := begin(t, s)
	pid := s.PID()
	s.Signal(pid, syscall.SIGTERM)
	p.heard(healthpb.HealthCheckResponse_NOT_SERVING)
	p.awaitEnd()
	p.finishUpload()
	s.AwaitEnd(pid, 0)
	s.Await(pid, "drained")
}

// A load balancer learns that it should look away while the server still serves.
func TestDelay(t *testing.T) {
	s := exampletest.Start(t, "-delay", "1h")
	p := begin(t, s)
	pid := s.PID()
	s.Signal(pid, syscall.SIGTERM)
	p.heard(healthpb.HealthCheckResponse_NOT_SERVING)
	got, err := ask(connect(t, s.Addr()), "hello")
	if want := fmt.Sprintf("version=v1 pid=%d hello", pid); got != want || err != nil {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	s.Interrupt(pid)
}

func TestReplacedIsInterrupted(t *testing.T) {
	s := exampletest.Start(t)
	begin(t, s)
	old, _ := s.Upgrade()
	s.Await(old, "draining")
	s.Interrupt(old)
	s.Stop()
}

func TestDrainDeadline(t *testing.T) {
	s := exampletest.Start(t, "-drain", "50ms")
	p := begin(t, s)
	pid := s.PID()
	s.Signal(pid, syscall.SIGTERM)
	s.AwaitEnd(pid, 1)
	if failure := s.Await(pid, "exiting")["error"]; !strings.Contains(failure, "has not ended") {
		t.Errorf("the process ended with %q", failure)
	}
	if got, err := p.upload.CloseAndRecv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, %v for an upload that was cut off", got, err)
	}
}

// A connection on which nothing comes does not hold up the drain for long.
func TestSilentConnection(t *testing.T) {
	s := exampletest.Start(t)
	conn, err := net.Dial("tcp", s.Addr())
	proctest.OK(t, err)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(proctest.Patience))
	// The server's settings.
	if _, err := io.ReadFull(conn, make([]byte, 9)); err != nil {
		t.Fatal(err)
	}
	s.Stop()
}

// A slowListener's Addr blocks once a connection has been accepted. The server calls
// it before it serves the connection.
type slowListener struct {
	net.Listener
	accepted chan struct{}
	release  chan struct{}
}

func (l *slowListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		close(l.accepted)
	}
	return conn, err
}

func (l *slowListener) Addr() net.Addr {
	select {
	case <-l.accepted:
		<-l.release
	default:
	}
	return l.Listener.Addr()
}

// A connection that has just been accepted when the drain begins is told to leave
// like all others, rather than closed, which would fail the call.
func TestAcceptedWhenTheDrainBegins(t *testing.T) {
	ln, err := net.Listen("tcp", "localhost:0")
	proctest.OK(t, err)
	file, err := ln.(*net.TCPListener).File()
	proctest.OK(t, err)
	defer file.Close()
	inherited, err := net.FileListener(file)
	proctest.OK(t, err)
	slow := &slowListener{ln, make(chan struct{}), make(chan struct{})}
	old := newServer(&door{TransportCredentials: insecure.NewCredentials()})
	successor := newServer(&door{TransportCredentials: insecure.NewCredentials()})

	served := make(chan struct{})
	go func() {
		defer close(served)
		old.serve(slow)
	}()
	conn := connect(t, ln.Addr().String())
	var wait sync.WaitGroup
	wait.Go(func() {
		if _, err := ask(conn, "hello"); err != nil {
			t.Error(err)
		}
	})
	<-slow.accepted
	ln.Close()
	go successor.serve(inherited)
	t.Cleanup(successor.grpc.Stop)
	// Without the door, GracefulStop would begin, which nothing shows.
	time.AfterFunc(50*time.Millisecond, func() { close(slow.release) })
	wait.Wait()
	proctest.Within(t, "the end of the drain", served)
}
