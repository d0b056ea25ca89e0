//go:build unix && !aix

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/exampletest"
	"github.com/coder/websocket"
)

func TestMain(m *testing.M) { exampletest.Main(m) }

// A client is one connection.
type client struct{ *websocket.Conn }

func dial(addr string) (*client, error) {
	ctx, cancel := context.WithTimeout(context.Background(), exampletest.Patience)
	defer cancel()
	conn, _, err := websocket.Dial(ctx, "ws://"+addr, nil)
	return &client{conn}, err
}

func (c *client) send(message string) error {
	ctx, cancel := context.WithTimeout(context.Background(), exampletest.Patience)
	defer cancel()
	return c.Write(ctx, websocket.MessageText, []byte(message))
}

// receive returns the next answer, which must be to this message.
func (c *client) receive(message string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), exampletest.Patience)
	defer cancel()
	_, answer, err := c.Read(ctx)
	if err == nil && !strings.HasSuffix(string(answer), " "+message) {
		err = fmt.Errorf("%q was answered by %q", message, answer)
	}
	return string(answer), err
}

// passing connects for every message.
func passing(s *exampletest.Service) exampletest.ClientFunc {
	return func() (string, error) {
		for {
			c, err := dial(s.Addr())
			if err != nil {
				return "", err
			}
			if err := c.send("hello"); err != nil {
				return "", err
			}
			answer, err := c.receive("hello")
			if websocket.CloseStatus(err) == websocket.StatusServiceRestart {
				continue
			}
			if err == nil {
				err = c.leave()
			}
			return answer, err
		}
	}
}

func (c *client) leave() error {
	err := c.Close(websocket.StatusNormalClosure, "")
	if websocket.CloseStatus(err) == websocket.StatusServiceRestart {
		return nil // The two have crossed.
	}
	return err
}

// A staying client keeps its connection until the server asks it to leave, and
// then connects again. It sends several messages before it reads the answers.
type staying struct {
	s *exampletest.Service
	c *client
	n int
}

func (st *staying) Exchange() (string, error) {
	const batch = 3
	answered := 0
	for {
		if st.c == nil {
			var err error
			if st.c, err = dial(st.s.Addr()); err != nil {
				return "", err
			}
		}
		// What has no answer is sent again on the new connection.
		for i := answered; i < batch; i++ {
			// It fails if the connection has been closed, and receive says how.
			_ = st.c.send(fmt.Sprint("message ", st.n+i))
		}
		for {
			answer, err := st.c.receive(fmt.Sprint("message ", st.n+answered))
			if websocket.CloseStatus(err) == websocket.StatusServiceRestart {
				st.c = nil
				break
			}
			if err != nil {
				return "", err
			}
			if answered++; answered == batch {
				st.n += batch
				return answer, nil
			}
		}
	}
}

func (st *staying) Leave() error {
	if st.c == nil {
		return nil
	}
	defer func() { st.c = nil }()
	return st.c.leave()
}

func TestUpgradeUnderLoad(t *testing.T) {
	s := exampletest.Start(t)
	s.UpgradeUnderLoad(nil, passing(s), &staying{s: s}, &staying{s: s}, &staying{s: s})
}

func TestSurviveFailures(t *testing.T) {
	s := exampletest.Start(t)
	s.SurviveFailures(passing(s), &staying{s: s}, &staying{s: s})
}

func connect(t *testing.T, addr string) *client {
	t.Helper()
	c, err := dial(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.CloseNow() })
	return c
}

func (c *client) mustAsk(t *testing.T, message string, pid int, version string) {
	t.Helper()
	err := c.send(message)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.receive(message)
	if want := fmt.Sprintf("version=%s pid=%d %s", version, pid, message); got != want || err != nil {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

func (c *client) awaitGoodbye(t *testing.T, want websocket.StatusCode) {
	t.Helper()
	if got, err := c.receive("nothing"); websocket.CloseStatus(err) != want {
		t.Errorf("got %q, %v, want a close frame with %d", got, err, want)
	}
}

func TestUpgradeSaysRestart(t *testing.T) {
	s := exampletest.Start(t)
	before := connect(t, s.Addr())
	before.mustAsk(t, "one", s.PID(), "v1")
	s.Install("v2")
	old, inCharge := s.Upgrade()
	before.awaitGoodbye(t, websocket.StatusServiceRestart)
	s.AwaitEnd(old, 0)
	s.Await(old, "drained")
	after := connect(t, s.Addr())
	after.mustAsk(t, "two", inCharge, "v2")
	if err := after.leave(); err != nil {
		t.Error(err)
	}
	s.Stop()
}

func TestStopSaysGoingAway(t *testing.T) {
	s := exampletest.Start(t)
	c := connect(t, s.Addr())
	pid := s.PID()
	c.mustAsk(t, "one", pid, "v1")
	s.Signal(pid, syscall.SIGTERM)
	c.awaitGoodbye(t, websocket.StatusGoingAway)
	s.AwaitEnd(pid, 0)
	s.Await(pid, "drained")
}

// A client that does not answer the close frame is cut off.
func TestDrainDeadline(t *testing.T) {
	s := exampletest.Start(t, "-drain", "50ms")
	c := connect(t, s.Addr())
	pid := s.PID()
	c.mustAsk(t, "one", pid, "v1")
	s.Signal(pid, syscall.SIGTERM)
	s.AwaitEnd(pid, 1)
	if failure := s.Await(pid, "exiting")["error"]; !strings.Contains(failure, "cut off") {
		t.Errorf("the process ended with %q", failure)
	}
}

// serve runs a server whose messages are handled by handle, and returns the server
// and its address.
func serve(t *testing.T, handle handler) (*server, string) {
	t.Helper()
	ln, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := newServer(handle)
	go srv.drainer.Serve(ln)
	t.Cleanup(srv.cutOff)
	return srv, ln.Addr().String()
}

// A message is answered before the close frame, and those that have no answer by
// then have not been handled.
func TestUnansweredIsNotHandled(t *testing.T) {
	const sent = 100
	handled := 0
	began, finish := make(chan struct{}), make(chan struct{})
	srv, addr := serve(t, func(ctx context.Context, conn *websocket.Conn, kind websocket.MessageType, message []byte) error {
		if handled++; handled == 1 {
			close(began)
			<-finish
		}
		return echo(ctx, conn, kind, message)
	})
	c := connect(t, addr)
	for i := range sent {
		if err := c.send(fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	<-began
	drained := make(chan error)
	go func() { drained <- srv.drain(exampletest.Patience) }()
	<-srv.drainer.Context().Done()
	// Without its lock, the close frame would be sent, which nothing here shows.
	time.AfterFunc(50*time.Millisecond, func() { close(finish) })

	answered := 0
	var err error
	for ; err == nil; answered++ {
		_, err = c.receive(fmt.Sprint(answered))
	}
	answered--
	if websocket.CloseStatus(err) != websocket.StatusServiceRestart {
		t.Errorf("the connection ended with %v", err)
	}
	if err := <-drained; err != nil {
		t.Error(err)
	}
	if answered != handled || answered == 0 {
		t.Errorf("%d messages were handled, %d answered", handled, answered)
	}
}

// A WebSocket that is opened during the drain, on a connection from before it, is
// told to leave as well.
func TestOpenedDuringDrain(t *testing.T) {
	srv, addr := serve(t, echo)
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	drained := make(chan error)
	go func() { drained <- srv.drain(exampletest.Patience) }()
	<-srv.drainer.Context().Done()

	ctx, cancel := context.WithTimeout(t.Context(), exampletest.Patience)
	defer cancel()
	onConn := &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}}
	opened, _, err := websocket.Dial(ctx, "ws://"+addr, &websocket.DialOptions{HTTPClient: onConn})
	if err != nil {
		t.Fatal(err)
	}
	(&client{opened}).awaitGoodbye(t, websocket.StatusServiceRestart)
	if err := <-drained; err != nil {
		t.Error(err)
	}
}
