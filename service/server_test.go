//go:build unix

package service_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/service"
)

// serveLines sends each line back, and returns when its clients have gone.
func serveLines(ln net.Listener) error {
	var clients sync.WaitGroup
	defer clients.Wait()
	for {
		conn, err := ln.Accept()
		if err != nil {
			return err
		}
		clients.Go(func() {
			defer conn.Close()
			for lines := bufio.NewScanner(conn); lines.Scan(); {
				fmt.Fprintln(conn, lines.Text())
			}
		})
	}
}

// A line client has a connection that is served.
type lineClient struct {
	t     *testing.T
	conn  net.Conn
	lines *bufio.Scanner
}

func dialLines(t *testing.T, network, addr string) *lineClient {
	t.Helper()
	conn, err := net.Dial(network, addr)
	proctest.OK(t, err)
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(proctest.Patience))
	c := &lineClient{t, conn, bufio.NewScanner(conn)}
	c.ask("hello")
	return c
}

func (c *lineClient) ask(line string) {
	c.t.Helper()
	fmt.Fprintln(c.conn, line)
	if !c.lines.Scan() || c.lines.Text() != line {
		c.t.Fatalf("got %q, %v", c.lines.Text(), c.lines.Err())
	}
}

func TestStreamDrains(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	r := startServers(t, quiet(), service.Stream("tcp", socket, serveLines, nil))
	r.socket = socket
	client := dialLines(t, "unix", socket)
	r.drainsFor(client)
}

// drainsFor checks that Run, once replaced, serves a client until that leaves, and accepts
// no other.
func (r *run) drainsFor(client *lineClient) {
	r.t.Helper()
	r.upg.end()
	proctest.AwaitThat(r.t, "it accepts no more", func() bool { return !r.accepts() })
	for range 20 {
		client.ask("still")
	}
	r.waits()
	client.conn.Close()
	proctest.OK(r.t, r.returns())
}

// waits checks that Run has not returned.
func (r *run) waits() {
	r.t.Helper()
	select {
	case err := <-r.ran:
		r.t.Fatalf("Run has returned %v", err)
	case <-time.After(50 * time.Millisecond): // Nothing shows that it waits.
	}
}

func TestStreamIsCut(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	opts := quiet()
	opts.DrainTimeout = time.Millisecond
	r := startServers(t, opts, service.Stream("unix", socket, serveLines, nil))
	dialLines(t, "unix", socket)
	r.upg.end()
	if err := r.returns(); err == nil || !strings.Contains(err.Error(), socket) || !strings.Contains(err.Error(), "1ms after it was replaced") {
		t.Errorf("got %v, want the address and the timeout", err)
	}
}

// It is shutdown that says how the drain went.
func TestShutdownDrains(t *testing.T) {
	for name, want := range map[string]error{"well": nil, "badly": errBroken} {
		t.Run(name, func(t *testing.T) {
			told, returns := make(chan struct{}), make(chan struct{})
			serve := func(net.Listener) error {
				defer close(returns)
				<-told
				return errors.New("a server's own for having been shut down")
			}
			shutdown := func(ctx context.Context) error {
				if _, ok := ctx.Deadline(); ok || ctx.Err() != nil {
					t.Errorf("the context is %v", ctx)
				}
				close(told)
				<-returns
				time.Sleep(10 * time.Millisecond) // in which a Run that takes it for a failure shows that: no correct one fails for it
				return want
			}
			r := startServers(t, quiet(), service.Stream("tcp", "localhost:0", serve, shutdown))
			r.upg.end()
			if err := r.returns(); !errors.Is(err, want) || want == nil && err != nil {
				t.Errorf("got %v, want %v", err, want)
			}
		})
	}
}

func TestPacketShutdown(t *testing.T) {
	told := make(chan struct{})
	serve := func(net.PacketConn) error { <-told; return nil }
	shutdown := func(context.Context) error { close(told); return errBroken }
	r := startServers(t, quiet(), service.Packet("udp", "localhost:0", serve, shutdown))
	r.upg.end()
	proctest.WantError(t, "Run", r.returns(), errBroken)
}

// What a serve that drains returns is how the drain went.
func TestServeDrainsBadly(t *testing.T) {
	serve := func(ln net.Listener) error {
		ln.Accept()
		return errBroken
	}
	r := startServers(t, quiet(), service.Stream("tcp", "localhost:0", serve, nil))
	r.upg.end()
	proctest.WantError(t, "Run", r.returns(), errBroken)
}

func TestShutdownThatHangs(t *testing.T) {
	opts := quiet()
	opts.DrainTimeout = time.Millisecond
	shutdown := func(context.Context) error { select {} }
	r := startServers(t, opts, service.Stream("tcp", "localhost:0", serveLines, shutdown))
	r.upg.end()
	if err := r.returns(); err == nil || !strings.Contains(err.Error(), "has not ended") {
		t.Errorf("got %v", err)
	}
}

// A serve that had not begun when shutdown was called would accept for ever.
func TestListenerIsClosedAfterShutdown(t *testing.T) {
	begin, ended := make(chan struct{}), make(chan error)
	serve := func(ln net.Listener) error {
		<-begin
		err := serveLines(ln)
		ended <- err
		return err
	}
	r := startServers(t, quiet(), service.Stream("tcp", "localhost:0", serve, func(context.Context) error { return nil }))
	r.end()
	close(begin)
	proctest.WantError(t, "serve", proctest.Within(t, "the end of serve", ended), net.ErrClosed)
}

func TestServersEnd(t *testing.T) {
	for name, server := range map[string]func(error) service.Server{
		"stream": func(err error) service.Server {
			return service.Stream("tcp", "localhost:0", func(net.Listener) error { return err }, nil)
		},
		"closed stream": func(err error) service.Server {
			return service.Stream("tcp", "localhost:0", func(ln net.Listener) error { ln.Close(); return err }, nil)
		},
		"packet": func(err error) service.Server {
			return service.Packet("udp", "localhost:0", func(net.PacketConn) error { return err }, nil)
		},
		"background": func(err error) service.Server {
			return service.Background(func(context.Context) error { return err })
		},
	} {
		t.Run(name+" by an error", func(t *testing.T) {
			r := startServers(t, quiet(), server(errBroken), service.HTTP(&http.Server{Addr: "localhost:0"}))
			if err := r.returns(); !errors.Is(err, errBroken) || r.upg.Replaced() {
				t.Errorf("got %v, want %v", err, errBroken)
			}
		})
		t.Run(name+" because it is done", func(t *testing.T) {
			r := startRun(t, quiet(), conversations())
			ended := make(chan struct{})
			done := service.Background(func(context.Context) error { close(ended); return nil })
			r.end()
			r = startServers(t, quiet(), server(nil), done)
			<-ended
			select {
			case <-r.upg.exit:
				t.Error("the service has ended with it")
			default:
			}
			r.end()
		})
	}
}

// A serve that is done may have closed its listener.
func TestServeHasClosed(t *testing.T) {
	closed := make(chan struct{})
	serve := func(ln net.Listener) error {
		defer close(closed)
		return ln.Close()
	}
	r := startServers(t, quiet(), service.Stream("tcp", "localhost:0", serve, nil))
	proctest.Within(t, "the end of serve", closed)
	r.end()
}

// askedFor is asked for sockets, and gives others.
type askedFor struct {
	replaceable
	sockets chan string
}

func (upg askedFor) Listen(network, addr string) (net.Listener, error) {
	upg.sockets <- network + " " + addr
	return net.Listen("tcp", "localhost:0")
}

func (upg askedFor) ListenPacket(network, addr string) (net.PacketConn, error) {
	upg.sockets <- network + " " + addr
	return net.ListenPacket("udp", "localhost:0")
}

func TestAddresses(t *testing.T) {
	http := func(addr string, config *tls.Config) service.Server {
		return service.HTTP(&http.Server{Addr: addr, TLSConfig: config})
	}
	stream := func(network, addr string) service.Server { return service.Stream(network, addr, serveLines, nil) }
	packet := func(network, addr string) service.Server {
		return service.Packet(network, addr, answerPackets(nil, nil), nil)
	}
	for want, server := range map[string]service.Server{
		"tcp :http":          http("", nil),
		"tcp :https":         http("", tlsConfig()),
		"tcp localhost:1":    http("localhost:1", nil),
		"tcp localhost:2":    http("localhost:2", tlsConfig()),
		"unix /path":         http("/path", nil),
		"unix @abstract":     stream("tcp", "@abstract"),
		"unixpacket /packet": stream("unixpacket", "/packet"),
		"tcp4 localhost:3":   stream("tcp4", "localhost:3"),
		"unixgram /datagram": packet("udp", "/datagram"),
		"unixgram @datagram": packet("udp", "@datagram"),
		"udp6 localhost:4":   packet("udp6", "localhost:4"),
	} {
		r := newRun(t)
		close(r.upg.parent)
		upg := askedFor{r.upg, make(chan string, 1)}
		r.run(upg, quiet(), server)
		if got := <-upg.sockets; got != want {
			t.Errorf("asked for %q, want %q", got, want)
		}
		r.end()
	}
}

// A server that the program has closed is done.
func TestHTTPIsClosed(t *testing.T) {
	server := conversations()
	r := startRun(t, quiet(), server)
	r.begin().end()
	server.Close()
	proctest.AwaitThat(t, "it accepts no more", func() bool { return !r.accepts() })
	r.waits()
	r.end()
}

// answerPackets says that it has a datagram, and answers when it may.
func answerPackets(got chan<- struct{}, may <-chan struct{}) func(net.PacketConn) error {
	return func(conn net.PacketConn) error {
		datagram := make([]byte, 100)
		for {
			n, client, err := conn.ReadFrom(datagram)
			if err != nil {
				return err
			}
			got <- struct{}{}
			<-may
			if _, err := conn.WriteTo(datagram[:n], client); err != nil {
				return err
			}
		}
	}
}

func TestPacketAnswersWhatItHas(t *testing.T) {
	for name, end := range map[string]func(*run){
		"replaced": func(r *run) { r.upg.end() },
		"stopped":  func(r *run) { r.signal(syscall.SIGTERM); <-r.upg.exit },
	} {
		t.Run(name, func(t *testing.T) {
			// The queue is the successor's.
			successor, err := net.ListenPacket("udp", "localhost:0")
			proctest.OK(t, err)
			defer successor.Close()
			got, may := make(chan struct{}, 10), make(chan struct{})
			r, told := startShared(t, successor, service.Packet("udp", "localhost:0", answerPackets(got, may), nil))
			client, err := net.Dial("udp", successor.LocalAddr().String())
			proctest.OK(t, err)
			defer client.Close()
			client.SetDeadline(time.Now().Add(proctest.Patience))
			client.Write([]byte("first"))
			<-got
			end(r)
			proctest.Within(t, "the end of reading", told)
			client.Write([]byte("second"))
			close(may)
			answer := make([]byte, 100)
			if n, err := client.Read(answer); err != nil || string(answer[:n]) != "first" {
				t.Errorf("got %q, %v", answer[:n], err)
			}
			proctest.OK(t, r.returns())
			successor.SetDeadline(time.Now().Add(proctest.Patience))
			if n, _, err := successor.ReadFrom(answer); err != nil || string(answer[:n]) != "second" {
				t.Errorf("the successor got %q, %v", answer[:n], err)
			}
		})
	}
}

// sharing returns a duplicate of a packet conn, as an Upgrader does.
type sharing struct {
	replaceable
	conn net.PacketConn
	told chan struct{}
}

// toldConn closes told when reads are to end.
type toldConn struct {
	net.PacketConn
	told chan struct{}
}

func (c toldConn) SetReadDeadline(t time.Time) error {
	defer close(c.told)
	return c.PacketConn.SetReadDeadline(t)
}

func (upg sharing) ListenPacket(string, string) (net.PacketConn, error) {
	file, err := upg.conn.(*net.UDPConn).File()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	conn, err := net.FilePacketConn(file)
	return toldConn{conn, upg.told}, err
}

func startShared(t *testing.T, conn net.PacketConn, servers ...service.Server) (r *run, told chan struct{}) {
	t.Helper()
	r, told = newRun(t), make(chan struct{})
	close(r.upg.parent)
	r.run(sharing{r.upg, conn, told}, quiet(), servers...)
	return r, told
}

func TestStopTimeout(t *testing.T) {
	const hour = time.Hour
	for name, c := range map[string]struct {
		drain, stop time.Duration
		end         func(*run)
		says        string
	}{
		"stopped": {hour, time.Millisecond, func(r *run) { r.signal(syscall.SIGTERM) }, "1ms after it was stopped"},
		"replaced, then told to stop": {hour, time.Millisecond, func(r *run) {
			r.upg.end()
			proctest.AwaitThat(r.t, "it accepts no more", func() bool { return !r.accepts() })
			r.signal(syscall.SIGTERM)
		}, "1ms after it was told to stop"},
		"replaced":   {time.Millisecond, hour, func(r *run) { r.upg.end() }, "1ms after it was replaced"},
		"by default": {time.Millisecond, 0, func(r *run) { r.signal(syscall.SIGTERM) }, "1ms after it was stopped"},
	} {
		t.Run(name, func(t *testing.T) {
			opts := quiet()
			opts.DrainTimeout, opts.StopTimeout = c.drain, c.stop
			r := startRun(t, opts, conversations())
			r.begin()
			c.end(r)
			r.isCutBy(c.says)
		})
	}
}

// A handler that has hijacked its connection has more to say.
func TestWaitHijacked(t *testing.T) {
	hijack := func(w http.ResponseWriter, _ *http.Request) {
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		go func() {
			defer conn.Close()
			for lines := bufio.NewScanner(buffered); lines.Scan(); {
				fmt.Fprintln(conn, lines.Text())
			}
		}()
	}
	opts := quiet()
	opts.WaitHijacked = true
	r := startRun(t, opts, &http.Server{Handler: http.HandlerFunc(hijack)})
	conn, err := net.Dial("unix", r.socket)
	proctest.OK(t, err)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(proctest.Patience))
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: service\r\n\r\n")
	client := &lineClient{t, conn, bufio.NewScanner(conn)}
	client.ask("hello")
	r.drainsFor(client)
}

// job is what a test sees of a Background.
type job struct{ began, told, end chan struct{} }

func newJob() (*job, service.Server) {
	j := &job{make(chan struct{}), make(chan struct{}), make(chan struct{})}
	return j, service.Background(func(ctx context.Context) error {
		close(j.began)
		<-ctx.Done()
		close(j.told)
		<-j.end
		return ctx.Err()
	})
}

func (j *job) hasBegun() bool { return proctest.IsClosed(j.began) }

func TestBackgroundWaitsForParent(t *testing.T) {
	j, server := newJob()
	r := startBesideParent(t, quiet(), server)
	r.signal(syscall.SIGHUP)
	if j.hasBegun() {
		t.Error("it runs beside the predecessor")
	}
	close(r.upg.parent)
	proctest.Within(t, "the job", j.began)
	<-r.upg.upgrades
	r.upg.outcomes <- errRefused
	if proctest.IsClosed(j.told) {
		t.Error("a failed upgrade has ended it")
	}
	r.upg.end()
	proctest.Within(t, "the end of its context", j.told)
	r.waits()
	close(j.end)
	proctest.OK(t, r.returns())
}

func TestBackgroundOfTheStopped(t *testing.T) {
	j, server := newJob()
	r := startBesideParent(t, quiet(), server)
	r.signal(syscall.SIGTERM)
	proctest.OK(t, r.returns())
	if j.hasBegun() {
		t.Error("it has run")
	}
}

func TestBackgroundThatHangs(t *testing.T) {
	j, server := newJob()
	opts := quiet()
	opts.DrainTimeout = time.Millisecond
	r := startServers(t, opts, server)
	proctest.Within(t, "the job", j.began)
	r.upg.end()
	if err := r.returns(); err == nil || !strings.Contains(err.Error(), "background has not ended") {
		t.Errorf("got %v", err)
	}
	close(j.end)
}
