package registry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
)

// The methods in this file claim and add the kinds of descriptors. What they
// promise to callers is documented at the methods of tableflip.Fds.

func (r *Registry) Listen(network, addr string) (net.Listener, error) {
	return r.listen(network, addr, func(network, addr string) (net.Listener, error) {
		ln, err := createSocket(r.listenConfig.Listen, network, addr)
		return likeInherited(ln, &r.listenConfig), err
	})
}

func (r *Registry) ListenWithCallback(network, addr string, callback func(network, addr string) (net.Listener, error)) (net.Listener, error) {
	if callback == nil {
		return r.listen(network, addr, nil)
	}
	return r.listen(network, addr, func(network, addr string) (net.Listener, error) {
		ln, err := createSocket(inContext(callback), network, addr)
		switch ln.(type) {
		case nil, *net.TCPListener, *net.UnixListener:
		default:
			r.warnOfWrapper(nametable.Name{Kind: nametable.Listener, Network: network, Addr: addr}, ln)
		}
		return withKeepAlive(ln, &r.listenConfig), err
	})
}

func (r *Registry) listen(network, addr string, create func(network, addr string) (net.Listener, error)) (net.Listener, error) {
	return listen(r, nametable.Name{Kind: nametable.Listener, Network: network, Addr: addr}, r.Listener, create, func(ln net.Listener) error {
		shared, ok := ln.(Listener)
		if !ok {
			return fmt.Errorf("tableflip: listen on %s %s: %T does not implement tableflip.Listener", network, addr, ln)
		}
		return r.AddListener(network, addr, shared, false)
	})
}

// inContext is for a callback that takes no context.
func inContext[T any](callback func(network, addr string) (T, error)) func(ctx context.Context, network, addr string) (T, error) {
	return func(_ context.Context, network, addr string) (T, error) { return callback(network, addr) }
}

// warnOfWrapper warns that the next generation does not get a callback's type.
func (r *Registry) warnOfWrapper(n nametable.Name, socket any) {
	if r.logger != nil {
		r.logger.Warn("tableflip: a callback has created a socket of a type that the next generation does not get: have it return what package net created, and wrap what Listen returns",
			"name", n.String(), "type", fmt.Sprintf("%T", socket))
	}
}

func (r *Registry) Listener(network, addr string) (net.Listener, error) {
	return claim(r, nametable.Name{Kind: nametable.Listener, Network: network, Addr: addr}, func(e *entry) (net.Listener, error) {
		ln, err := open(r, e, net.FileListener)
		if err != nil {
			return nil, err
		}
		return withKeepAlive(ln, &r.listenConfig), nil
	})
}

// AddListener takes the place of those of the same name if supersede is set.
func (r *Registry) AddListener(network, addr string, ln Listener, supersede bool) error {
	return r.add(newEntry(nametable.Listener, network, addr), supersede, ln)
}

func (r *Registry) RemoveListener(network, addr string) error {
	return r.remove(nametable.Name{Kind: nametable.Listener, Network: network, Addr: addr})
}

func (r *Registry) ListenPacket(network, addr string) (net.PacketConn, error) {
	return r.listenPacket(network, addr, func(network, addr string) (net.PacketConn, error) {
		return createSocket(r.listenConfig.ListenPacket, network, addr)
	})
}

func (r *Registry) ListenPacketWithCallback(network, addr string, callback func(network, addr string) (net.PacketConn, error)) (net.PacketConn, error) {
	if callback == nil {
		return r.listenPacket(network, addr, nil)
	}
	return r.listenPacket(network, addr, func(network, addr string) (net.PacketConn, error) {
		conn, err := createSocket(inContext(callback), network, addr)
		switch conn.(type) {
		case nil, *net.UDPConn, *net.UnixConn, *net.IPConn:
		default:
			r.warnOfWrapper(nametable.Name{Kind: nametable.PacketConn, Network: network, Addr: addr}, conn)
		}
		return conn, err
	})
}

func (r *Registry) listenPacket(network, addr string, create func(network, addr string) (net.PacketConn, error)) (net.PacketConn, error) {
	return listen(r, nametable.Name{Kind: nametable.PacketConn, Network: network, Addr: addr}, r.PacketConn, create, func(conn net.PacketConn) error {
		shared, ok := conn.(PacketConn)
		if !ok {
			return fmt.Errorf("tableflip: listen on %s %s: %T does not implement tableflip.PacketConn", network, addr, conn)
		}
		err := r.AddPacketConn(network, addr, shared, false)
		if err != nil {
			// Unlike a listener's, its Close leaves the file.
			var files socketFiles
			bound, _ := conn.LocalAddr().(*net.UnixAddr)
			if bound != nil {
				if file := files.find(bound.Name, addr); file != nil {
					err = errors.Join(err, file.unlink())
				}
			}
		}
		return err
	})
}

func (r *Registry) PacketConn(network, addr string) (net.PacketConn, error) {
	return claim(r, nametable.Name{Kind: nametable.PacketConn, Network: network, Addr: addr}, func(e *entry) (net.PacketConn, error) {
		return open(r, e, net.FilePacketConn)
	})
}

// AddPacketConn takes the place of those of the same name if supersede is set.
func (r *Registry) AddPacketConn(network, addr string, conn PacketConn, supersede bool) error {
	return r.add(newEntry(nametable.PacketConn, network, addr), supersede, conn)
}

func (r *Registry) RemovePacketConn(network, addr string) error {
	return r.remove(nametable.Name{Kind: nametable.PacketConn, Network: network, Addr: addr})
}

func (r *Registry) Conn(network, addr string) (net.Conn, error) {
	return claim(r, nametable.Name{Kind: nametable.Conn, Network: network, Addr: addr}, func(e *entry) (net.Conn, error) {
		// The scratch file would keep open what the caller closes.
		file, err := e.duplicate("")
		if err != nil {
			return nil, err
		}
		defer file.Close()
		conn, err := net.FileConn(file)
		if err != nil {
			return nil, err
		}
		shared, ok := conn.(Conn)
		if !ok {
			conn.Close()
			return nil, fmt.Errorf("%T does not implement tableflip.Conn", conn)
		}
		r.log(e.close())
		e.conn = shared
		return conn, nil
	})
}

func (r *Registry) AddConn(network, addr string, conn Conn) error {
	return r.add(newEntry(nametable.Conn, network, addr), true, conn)
}

func (r *Registry) RemoveConn(network, addr string) error {
	return r.remove(nametable.Name{Kind: nametable.Conn, Network: network, Addr: addr})
}

func (r *Registry) File(name string) (*os.File, error) {
	return claim(r, nametable.Name{Kind: nametable.File, Network: name}, func(e *entry) (*os.File, error) {
		return e.duplicate(e.Name.String())
	})
}

func (r *Registry) Files() ([]*os.File, error) {
	r.mu.Lock()
	defer r.unlock()
	if r.closed != nil {
		return nil, r.closed
	}
	var files []*os.File
	var claimed []*entry
	for _, e := range r.index.entries {
		if e.claimed || e.Kind != nametable.File {
			continue
		}
		file, err := e.duplicate(e.Name.String())
		if err != nil {
			for _, file := range files {
				file.Close()
			}
			return nil, fmt.Errorf("tableflip: can't open inherited %q: %w", e.Name, err)
		}
		files = append(files, file)
		claimed = append(claimed, e)
	}
	for _, e := range claimed {
		e.claimed = true
	}
	return files, nil
}

func (r *Registry) AddFile(name string, file *os.File) error {
	return r.add(newEntry(nametable.File, name, ""), true, file)
}

func (r *Registry) RemoveFile(name string) error {
	return r.remove(nametable.Name{Kind: nametable.File, Network: name})
}

// open returns what package net makes of e's descriptor.
func open[T any](r *Registry, e *entry, fileSocket func(*os.File) (T, error)) (T, error) {
	file, err := r.scratch.File(e.fd)
	if err != nil {
		var none T
		return none, err
	}
	socket, err := fileSocket(file)
	if owner, ok := any(socket).(syscall.Conn); ok && e.file != nil {
		e.setOwner(owner)
	}
	return socket, err
}

// listen is what all Listen methods do, for either kind of socket.
func listen[T interface {
	comparable
	Close() error
}](r *Registry, n nametable.Name, claim, create func(network, addr string) (T, error), add func(T) error) (T, error) {
	network, addr := n.Network, n.Addr
	var none T
	// A socket that is bound now could take an address that the new process needs.
	r.mu.Lock()
	r.waitUnfrozenLocked()
	err := r.closed
	r.unlock()
	if err != nil {
		return none, fmt.Errorf("tableflip: listen on %s %s: %w", network, addr, err)
	}

	socket, err := claim(network, addr)
	if err != nil || socket != none {
		return socket, err
	}
	if create == nil {
		return none, fmt.Errorf("tableflip: can't create new socket for %s %s: the callback is nil", network, addr)
	}
	// The lock is not held here: resolving a name may take long.
	socket, err = create(network, addr)
	if err != nil {
		return none, fmt.Errorf("tableflip: can't create new socket for %s %s: %w%s", network, addr, err, r.unclaimedHint(n, err))
	}
	if socket == none {
		return none, fmt.Errorf("tableflip: can't create new socket for %s %s: the callback returned nil", network, addr)
	}
	if err := add(socket); err != nil {
		socket.Close()
		return none, err
	}
	return socket, nil
}

// unclaimedHint names the inherited sockets that may be the reason for err.
func (r *Registry) unclaimedHint(n nametable.Name, err error) string {
	if !r.hasInherited || !descriptor.IsAddrInUse(err) {
		return ""
	}
	want, ok := parseListenAddr(n)
	if !ok {
		return ""
	}
	r.mu.Lock()
	defer r.unlock()
	var names []string
	for _, e := range append(r.index.inTheWayOf(want), r.expired.inTheWayOf(want)...) {
		names = append(names, fmt.Sprintf("%q%s", e.Name, e.boundHint()))
	}
	if len(names) == 0 {
		return ""
	}
	if len(names) > maxHints {
		names = append(names[:maxHints], "…")
	}
	return ": inherited and not claimed: " + strings.Join(names, ", ")
}

// maxHints keeps an error readable.
const maxHints = 5
