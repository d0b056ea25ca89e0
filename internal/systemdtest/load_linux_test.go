package systemdtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
)

// This file owns the clients. Each checks every answer, and repeats no request.

const (
	tcpAddr  = "127.0.0.1:8080"
	udpAddr  = "127.0.0.1:8053"
	unixPath = "/run/web.sock"
)

// pace is how long a client waits between two exchanges: short enough that every moment
// meets some of them, and long enough that ports do not run out.
const pace = 5 * time.Millisecond

// A load is clients at work.
type load struct {
	stop    chan struct{}
	ending  sync.Once
	working sync.WaitGroup
	clients []*client
	crashes atomic.Bool // requests that a process has begun may be lost

	mu      sync.Mutex
	answers map[string]int // by version and process ID
	refused []error        // connects
	cut     []error        // other failures
}

type client struct {
	name     string
	leave    func()
	exchange func(body string) (answer string, err error)
	begun    atomic.Int64
}

// startLoad has clients of all kinds work until the end of the test.
func startLoad(t *testing.T) *load {
	l := &load{stop: make(chan struct{}), answers: make(map[string]int)}
	for _, network := range []string{"tcp", "unix"} {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			l.clients = append(l.clients, l.http(network, method, false), l.http(network, method, true))
		}
	}
	l.clients = append(l.clients, &client{name: "udp", exchange: l.udp, leave: func() {}})
	for _, c := range l.clients {
		l.working.Go(func() { l.work(c) })
	}
	t.Cleanup(l.end)
	return l
}

// end returns when all clients have finished.
func (l *load) end() {
	l.ending.Do(func() { close(l.stop) })
	l.working.Wait()
}

func (l *load) work(c *client) {
	defer c.leave()
	next := time.NewTicker(pace)
	defer next.Stop()
	for {
		body := fmt.Sprintf("%s, %d", c.name, c.begun.Add(1))
		answer, err := c.exchange(body)
		version, rest, _ := strings.Cut(answer, " ")
		pid, got, _ := strings.Cut(rest, " ")
		if err == nil && got != body {
			err = fmt.Errorf("got the answer %q", answer)
		}
		l.mu.Lock()
		if err == nil {
			l.answers[version+" "+pid]++
		} else if !errors.Is(err, errRefused) { // which is counted already
			l.cut = append(l.cut, fmt.Errorf("%s: %w", body, err))
		}
		l.mu.Unlock()
		select {
		case <-l.stop:
			return
		case <-next.C:
		}
	}
}

var errRefused = errors.New("connect")

// http returns a client whose requests have a body that it can't send again.
func (l *load) http(network, method string, keep bool) *client {
	address := map[string]string{"tcp": tcpAddr, "unix": unixPath}[network]
	name := network + " " + method + " on new connections"
	if keep {
		name = network + " " + method + " on a kept connection"
	}
	c := &http.Client{Timeout: proctest.Patience, Transport: &http.Transport{
		DisableKeepAlives: !keep,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			if err != nil {
				err = fmt.Errorf("%w: %w", errRefused, err)
				l.mu.Lock()
				l.refused = append(l.refused, err)
				l.mu.Unlock()
			}
			return conn, err
		},
	}}
	return &client{name: name, leave: c.CloseIdleConnections, exchange: func(body string) (string, error) {
		request, err := http.NewRequest(method, "http://web/", io.MultiReader(strings.NewReader(body)))
		if err != nil {
			return "", err
		}
		response, err := c.Do(request)
		if err != nil {
			return "", err
		}
		defer response.Body.Close()
		answer, err := io.ReadAll(response.Body)
		return string(answer), err
	}}
}

func (l *load) udp(body string) (string, error) {
	conn, err := net.Dial("udp", udpAddr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(body)); err != nil {
		return "", err
	}
	answer := make([]byte, 1500)
	for late := time.Now().Add(proctest.Patience); ; {
		conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := conn.Read(answer)
		if errors.Is(err, os.ErrDeadlineExceeded) && !l.crashes.Load() && time.Now().Before(late) {
			continue
		}
		return string(answer[:n]), err
	}
}

// settle waits until all clients have had an exchange that began after its call.
func (l *load) settle(t *testing.T) {
	t.Helper()
	for _, c := range l.clients {
		begun := c.begun.Load()
		proctest.AwaitThat(t, c.name+" is answered", func() bool { return c.begun.Load() >= begun+2 })
	}
}

// awaitAnswers waits until this process has answered.
func (l *load) awaitAnswers(t *testing.T, version string, pid int) {
	t.Helper()
	key := version + " " + strconv.Itoa(pid)
	proctest.AwaitThat(t, "answers of "+key, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.answers[key] >= len(l.clients)
	})
}

// answering returns the PID of a process of this version that has answered, or 0.
func (l *load) answering(version string) (pid int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for process := range l.answers {
		if by, id, _ := strings.Cut(process, " "); by == version {
			pid, _ = strconv.Atoi(id)
		}
	}
	return pid
}

// take returns who has answered, and the failures since the last call.
func (l *load) take() (answers map[string]int, refused, cut []error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	refused, cut = l.refused, l.cut
	l.refused, l.cut = nil, nil
	return maps.Clone(l.answers), refused, cut
}
