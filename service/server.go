package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"example.com/tableflip/internal/trial"
)

// This file owns what a server is to a process: how it is opened, serves and ends.

// A Server is what [Run] runs. [HTTP], [Stream], [Packet] and [Background] make one,
// which can be run once.
type Server struct {
	open func(*process) (*front, error)
}

// A front is a server that has all that it needs to serve.
type front struct {
	name     string
	serve    func() error                // serves until it is told to end, or fails
	shutdown func(context.Context) error // drains, which ends serve
	close    func() error                // closes its socket, or nil

	connections func() int // how many it has, or nil if that is not known

	// serveDrains is set if it is serve that drains, so that it counts what it returns
	// once it is told to end. Otherwise it is what shutdown returns.
	serveDrains bool

	ended chan struct{} // closed when serve has returned
	err   error         // why, once ended is closed; nil if it is done, or was told to
}

// Stream returns a Server for anything that serves connections: gRPC, DNS over TCP, SSH.
//
// The network and the address are those of net.Listen. An address that begins with a
// slash, or with @, is a Unix socket's whatever the network. Run calls serve, in a
// goroutine of its own, with the listener that was inherited or created, once the process
// is ready. The listener is the net package's own type. Serve should go on until the
// service is to end; if it returns nil before that, it is done, and the others go on.
//
// Once the process has been replaced or stopped, Run calls shutdown, which is to stop
// serve from accepting, to end what has begun, and to return when that is done, or soon
// after its context has ended. It can be called before serve has done anything. Its error
// is Run's, and what serve returns from then on does not matter: most servers have an
// error of their own for it. Then the listener is closed.
//
// If shutdown is nil, the listener is closed, which has Accept fail with net.ErrClosed,
// and serve must return when all its connections have come to their end. An error that
// is not net.ErrClosed is Run's.
//
// A connection that a process has accepted is its own to serve, also if that has been
// replaced. After an upgrade the new process has those in the listener's queue. If the
// process was stopped, those are reset: see Options.DrainDelay.
func Stream(network, addr string, serve func(net.Listener) error, shutdown func(context.Context) error) Server {
	return Server{func(p *process) (*front, error) {
		ln, err := p.listen(network, addr)
		if err != nil {
			return nil, err
		}
		f := &front{
			name:     "the server on " + ln.Addr().String(),
			serve:    func() error { return serve(ln) },
			shutdown: shutdown,
			close:    ln.Close,
		}
		if shutdown == nil {
			f.serveDrains = true
			f.shutdown = func(context.Context) error { return ln.Close() }
		}
		return f, nil
	}}
}

// Packet returns a Server for anything that answers datagrams.
//
// It is to net.ListenPacket what [Stream] is to net.Listen, and calls serve and shutdown
// as Stream does. An address that begins with a slash, or with @, is a Unix socket's
// (unixgram).
//
// The socket and its queue are shared with the new process, which answers what this one
// has not read. So to end is to read no more, to answer what was read, and then to close
// the packet conn, which leaves the new process's open. If shutdown is nil, reads fail
// with os.ErrDeadlineExceeded from then on, and serve must return once it has answered. A
// read that has got a datagram returns it all the same, so that none is lost. An error
// that is neither os.ErrDeadlineExceeded nor net.ErrClosed is Run's. If the process was
// stopped, what is in the queue is lost.
func Packet(network, addr string, serve func(net.PacketConn) error, shutdown func(context.Context) error) Server {
	return Server{func(p *process) (*front, error) {
		conn, err := p.listenPacket(network, addr)
		if err != nil {
			return nil, err
		}
		f := &front{
			name:     "the server on " + conn.LocalAddr().String(),
			serve:    func() error { return serve(conn) },
			shutdown: shutdown,
			close:    conn.Close,
		}
		if shutdown == nil {
			f.serveDrains = true
			f.shutdown = func(context.Context) error { return conn.SetReadDeadline(time.Unix(1, 0)) }
		}
		return f, nil
	}}
}

// Background returns a Server for what only one process of the service may do at a time,
// such as a consumer of a queue, a timetable of jobs, or the only writer of a database.
//
// Run calls run, in a goroutine of its own, once this process is in charge and all
// earlier ones have ended. The context ends once the process has been replaced or stopped;
// then run should finish what it has begun, and return. A failed upgrade does not touch
// it. If it returns nil before, it is done, and the servers go on; an error ends the
// service, as a server's does.
//
// So it never runs in two generations at once, over upgrades, failed upgrades and
// crashes, and there are gaps in which it runs in none: from an upgrade until the old
// process has ended, which is when its connections have drained and its own run has
// returned, Options.DrainTimeout later at most. Keep that short if the gap matters. A
// process that is replaced while earlier ones drain, as far as the MaxDraining of
// [tableflip.Options] allows, never calls run, and the gap goes on. If run takes longer
// than the drain may, Run returns an error, and the program must exit at once. A first
// generation has no predecessor: that whoever starts one waits until there is no process
// left of the last, as supervisors do, is not Run's to see. Outside Linux, take locks with
// some patience: the kernel may release those of a process that was killed a moment after
// its end is known.
func Background(run func(context.Context) error) Server {
	return Server{func(p *process) (*front, error) {
		ctx, cancel := context.WithCancel(context.Background())
		return &front{
			name: "what runs in the background",
			serve: func() error {
				<-trial.Ended()
				if trial.WasUndone() {
					return nil
				}
				if err := p.upg.WaitForParent(ctx); err != nil {
					return err
				}
				return run(ctx)
			},
			shutdown: func(context.Context) error {
				cancel()
				return nil
			},
			serveDrains: true,
		}, nil
	}}
}

// isUnix reports whether an address is a Unix socket's.
func isUnix(addr string) bool { return strings.HasPrefix(addr, "/") || strings.HasPrefix(addr, "@") }

func (p *process) listen(network, addr string) (net.Listener, error) {
	if isUnix(addr) && network != "unixpacket" {
		network = "unix"
	}
	ln, err := p.upg.Listen(network, addr)
	if err == nil {
		p.opts.Logger.Info("listening", "network", network, "addr", ln.Addr().String())
	}
	return ln, err
}

func (p *process) listenPacket(network, addr string) (net.PacketConn, error) {
	if isUnix(addr) {
		network = "unixgram"
	}
	conn, err := p.upg.ListenPacket(network, addr)
	if err == nil {
		p.opts.Logger.Info("listening", "network", network, "addr", conn.LocalAddr().String())
	}
	return conn, err
}

// run serves, and closes ended when it has returned.
func (f *front) run(exit <-chan struct{}) {
	defer close(f.ended)
	err := f.serve()
	select {
	case <-exit:
		if !f.serveDrains || endsAsTold(err) {
			return
		}
	default:
	}
	if err != nil {
		f.err = fmt.Errorf("service: %s: %w", f.name, err)
	}
}

// endsAsTold reports whether an error is what a serve or run returns that has been told
// to end by its listener, its packet conn or its context.
func endsAsTold(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.Canceled)
}

// cutTimeout is how long a shutdown may take to return once its context has ended. A serve
// that drains does not know of the context.
const cutTimeout = time.Second

// drain returns when the server has ended, or has not although ctx has. Whatever has not
// ended then goes on until the process exits.
func (f *front) drain(ctx context.Context) error {
	drained := make(chan error, 1)
	go func() {
		err := f.shutdown(ctx)
		if errors.Is(err, net.ErrClosed) {
			err = nil
		}
		if f.serveDrains {
			<-f.ended
		}
		if f.close != nil {
			f.close() // A serve that had not begun fails by it.
		}
		drained <- errors.Join(err, f.failure())
	}()

	select {
	case err := <-drained:
		return err
	case <-ctx.Done():
	}
	if !f.serveDrains {
		select {
		case err := <-drained:
			return err
		case <-time.After(cutTimeout):
		}
	}
	return fmt.Errorf("service: %s has not ended: %w", f.name, context.Cause(ctx))
}

// failure returns what has ended serve, if it has ended.
func (f *front) failure() error {
	select {
	case <-f.ended:
		return f.err
	default:
		return nil
	}
}
