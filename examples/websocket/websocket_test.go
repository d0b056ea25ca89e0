//go:build unix

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/exampletest"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/service"
	stub "example.com/tableflip/testing"
	"github.com/coder/websocket"
)

func TestMain(m *testing.M) { exampletest.Main(m) }

// A client is one connection.
type client struct{ *websocket.Conn }

func dial(addr string) (*client, error) {
	ctx, cancel := context.WithTimeout(context.Background(), proctest.Patience)
	defer cancel()
	conn, _, err := websocket.Dial(ctx, "ws://"+addr, nil)
	return &client{conn}, err
}

func (c *client) send(message string) error {
	ctx, cancel := context.WithTimeout(context.Background(), proctest.Patience)
	defer cancel()
	return c.Write(ctx, websocket.MessageText, []byte(message))
}

// receive returns the next answer, which must be to this message.
func (c *client) receive(message string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), proctest.Patience)
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
	proctest.OK(t, err)
	t.Cleanup(func() { c.CloseNow() })
	return c
}

func (c *client) mustAsk(t *testing.T, message string, pid int, version string) {
	t.Helper()
	err := c.send(message)
	proctest.OK(t, err)
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

func TestReplacedIsInterrupted(t *testing.T) {
	s := exampletest.Start(t)
	connect(t, s.Addr()).mustAsk(t, "one", s.PID(), "v1")
	old, _ := s.Upgrade()
	s.Await(old, "draining")
	s.Interrupt(old)
	s.Stop()
}

// A client that does not answer the close frame is cut off.
func TestDrainDeadline(t *testing.T) {
	s := exampletest.Start(t, "-drain", "50ms")
	c := connect(t, s.Addr())
	pid := s.PID()
	c.mustAsk(t, "one", pid, "v1")
	s.Signal(pid, syscall.SIGTERM)
	s.AwaitEnd(pid, 1)
	if failure := s.Await(pid, "exiting")["error"]; !strings.Contains(failure, "hijacked") {
		t.Errorf("the process ended with %q", failure)
	}
}

// A served is a server in this process.
type served struct {
	t    *testing.T
	upg  *stub.Upgrader
	addr string
	ran  chan error
}

type handler = func(*websocket.Conn, websocket.MessageType, []byte) error

// serve runs a server whose messages are handled by handle.
func serve(t *testing.T, handle handler) *served {
	t.Helper()
	upg, err := stub.New()
	proctest.OK(t, err)
	addr := filepath.Join(t.TempDir(), "socket")
	s := &served{t, upg, addr, make(chan error, 1)}
	opts := service.Options{WaitHijacked: true, Logger: slog.New(slog.DiscardHandler)}
	go func() {
		s.ran <- service.Run(upg, opts, service.HTTP(&http.Server{Addr: addr, Handler: server{upg, handle}}))
	}()
	proctest.AwaitThat(t, "it serves", func() bool {
		conn, err := s.dial()
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return s
}

func (s *served) dial() (net.Conn, error) { return net.Dial("unix", s.addr) }

// connect opens a WebSocket on a connection.
func (s *served) connect(conn net.Conn) *client {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), proctest.Patience)
	defer cancel()
	onConn := &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}}
	opened, _, err := websocket.Dial(ctx, "ws://example", &websocket.DialOptions{HTTPClient: onConn})
	proctest.OK(s.t, err)
	s.t.Cleanup(func() { opened.CloseNow() })
	return &client{opened}
}

// drained waits for the end of the drain.
func (s *served) drained() {
	s.t.Helper()
	proctest.OK(s.t, proctest.Within(s.t, "the end of the drain", s.ran))
}

// A drain waits for the message that is being handled, and its answer comes before
// the close frame.
func TestHandledBeforeGoodbye(t *testing.T) {
	began, finish := make(chan struct{}), make(chan struct{})
	s := serve(t, func(conn *websocket.Conn, kind websocket.MessageType, message []byte) error {
		close(began)
		<-finish
		return echo(conn, kind, message)
	})
	c := s.connect(proctest.Must(s.dial()))
	proctest.OK(t, c.send("one"))
	<-began
	s.upg.Stop()
	select {
	case err := <-s.ran:
		t.Fatalf("the drain ended with %v while a message was being handled", err)
	case <-time.After(50 * time.Millisecond): // Nothing shows that it waits.
	}
	close(finish)
	if _, err := c.receive("one"); err != nil {
		t.Error(err)
	}
	c.awaitGoodbye(t, websocket.StatusGoingAway)
	s.drained()
}

// A message that crosses the close frame is not handled, because it would get no answer.
func TestUnansweredIsNotHandled(t *testing.T) {
	var handled atomic.Int64
	s := serve(t, func(conn *websocket.Conn, kind websocket.MessageType, message []byte) error {
		handled.Add(1)
		return echo(conn, kind, message)
	})
	// By hand, because the library sends nothing after a close frame.
	conn := proctest.Must(s.dial())
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(proctest.Patience))
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
	from := bufio.NewReader(conn)
	if response, err := http.ReadResponse(from, nil); err != nil || response.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("got %v, %v", response, err)
	}
	// The opcodes are those of RFC 6455, section 5.2; the mask is zero.
	const text, goodbye = 1, 8
	send := func(opcode byte, payload string) {
		t.Helper()
		frame := append([]byte{0x80 | opcode, 0x80 | byte(len(payload)), 0, 0, 0, 0}, payload...)
		if _, err := conn.Write(frame); err != nil {
			t.Fatal(err)
		}
	}
	receive := func(opcode byte) string {
		t.Helper()
		header := make([]byte, 2)
		if _, err := io.ReadFull(from, header); err != nil || header[0] != 0x80|opcode {
			t.Fatalf("got a frame that begins with %x, %v, want opcode %d", header, err, opcode)
		}
		payload := make([]byte, header[1])
		if _, err := io.ReadFull(from, payload); err != nil {
			t.Fatal(err)
		}
		return string(payload)
	}
	send(text, "one")
	receive(text)
	s.upg.Stop()
	code := receive(goodbye)[:2]
	send(text, "two")
	send(goodbye, code)
	s.drained()
	if n := handled.Load(); n != 1 {
		t.Errorf("%d messages were handled, 1 answered", n)
	}
}

// A WebSocket that is opened during the drain, on a connection from before it, is
// told to leave as well.
func TestOpenedDuringDrain(t *testing.T) {
	s := serve(t, echo)
	conn := proctest.Must(s.dial())
	defer conn.Close()
	// The server has accepted the first when it has answered the second.
	if err := s.connect(proctest.Must(s.dial())).leave(); err != nil {
		t.Fatal(err)
	}
	s.upg.Stop()
	s.connect(conn).awaitGoodbye(t, websocket.StatusGoingAway)
	s.drained()
}
