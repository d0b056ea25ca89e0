package httpdrain_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"example.com/tableflip/httpdrain"
)

// hijack keeps the connection until its client sends a line, as the h2c handler of
// golang.org/x/net does until all is done.
func hijack(w http.ResponseWriter, r *http.Request) {
	nc, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	io.WriteString(nc, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\n")
	go func() {
		defer nc.Close()
		buffered.ReadString('\n')
	}()
}

// Progress says how many connections are left, whether they are active, and how
// many the server has given away.
func TestProgress(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		gate := newGate()
		mux := http.NewServeMux()
		mux.Handle("/gate", gate)
		mux.HandleFunc("/hijack", hijack)
		c.handler = mux
		s := start(t, c)
		expect := func(want httpdrain.Progress) {
			t.Helper()
			for begin := time.Now(); s.Progress() != want; time.Sleep(time.Millisecond) { // a poll
				if time.Since(begin) > patience {
					t.Fatalf("%+v, want %+v", s.Progress(), want)
				}
			}
		}
		expect(httpdrain.Progress{})
		active := dial(t, s.addr)
		active.send(get("/gate"))
		wait(t, gate.entered, "the request")
		var hijacked []*client
		for range 200 { // more than are kept without looking whether they are closed
			c := dial(t, s.addr)
			c.send(get("/hijack"))
			c.switches()
			if len(hijacked) < 2 {
				hijacked = append(hijacked, c)
			} else {
				c.send("\n")
			}
		}
		expect(httpdrain.Progress{Connections: 1, Active: 1, Hijacked: 2})
		result := s.drain(t.Context())
		hijacked[0].send("\n")
		expect(httpdrain.Progress{Connections: 1, Active: 1, Hijacked: 1})
		gate.open()
		active.answer().more(t, "")
		active.Close()
		s.finished(result)
		expect(httpdrain.Progress{Hijacked: 1})
		hijacked[1].send("\n")
		expect(httpdrain.Progress{})
	})
}

// With WaitHijacked, the drain ends when hijacked connections are closed.
func TestWaitHijacked(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		c.handler = http.HandlerFunc(hijack)
		s := start(t, c)
		s.WaitHijacked = true
		client := dial(t, s.addr)
		client.send(get("/"))
		client.switches()
		shutdown := make(chan struct{})
		s.server.RegisterOnShutdown(func() { close(shutdown) })
		result := s.drain(t.Context())
		wait(t, shutdown, "the function for Shutdown") // which may tell the connection to end
		select {
		case err := <-result:
			t.Errorf("Shutdown has returned: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
		client.send("\n")
		s.finished(result)
	})
}

// Hijacked connections that are left when the context ends are counted, and open.
func TestWaitHijackedCut(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(hijack)})
	s.WaitHijacked = true
	client := dial(t, s.addr)
	client.send(get("/"))
	client.switches()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := wait(t, s.drain(ctx), "Shutdown")
	var cut *httpdrain.CutError
	if !errors.As(err, &cut) || cut.Connections != 0 || cut.Hijacked != 1 || !strings.Contains(err.Error(), "1 hijacked left open") {
		t.Errorf("got %v; want 1 hijacked connection left", err)
	}
	client.send("\n")
	client.closed()
}

// Hijacked connections that nobody waits for are not cut.
func TestHijackedIsNotCut(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(hijack)})
	client := dial(t, s.addr)
	client.send(get("/"))
	client.switches()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.finished(s.drain(ctx))
	client.send("\n")
	client.closed()
}

// A log is written to by any goroutine.
type logBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func logger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
			return slog.Attr{}
		}
		return a
	}}))
}

// The log says when a drain begins, how it goes on, and when it ends.
func TestLog(t *testing.T) {
	gate := make(chan struct{})
	inBubble(t, config{grace: time.Second, handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-gate })},
		func(t *testing.T, s *service, m *memory) {
			gate = make(chan struct{})
			var log logBuffer
			s.Logger = logger(&log)
			m.client(t)
			c := m.client(t)
			c.send(get("/"))
			synctest.Wait()
			result := s.drain(t.Context())
			pass(6 * time.Second)
			again := s.drain(t.Context()) // joins it
			synctest.Wait()
			close(gate)
			c.answer().more(t, "")
			s.finishedInBubble(result)
			if err := <-again; err != nil {
				t.Error(err)
			}
			want := `msg="drain begins" connections=2 active=1 hijacked=0
msg="drain goes on" connections=1 active=1 hijacked=0 since=5s
msg="drain ends" connections=0 active=0 hijacked=0 took=7.01s
`
			if got := log.String(); got != want {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
}

// The log says what was cut.
func TestLogCut(t *testing.T) {
	gate := newGate()
	inBubble(t, config{handler: gate}, func(t *testing.T, s *service, m *memory) {
		gate.opened, gate.entered = make(chan struct{}), make(chan struct{}, 1)
		var log logBuffer
		s.Logger = logger(&log)
		c := m.client(t)
		c.send(get("/"))
		<-gate.entered
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		<-s.drain(ctx)
		gate.open()
		if !strings.Contains(log.String(), `msg="drain failed"`) || !strings.Contains(log.String(), "1 connection cut") {
			t.Errorf("got %s", log.String())
		}
	})
}
