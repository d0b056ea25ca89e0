package registry

import (
	"fmt"
	"net"
	"os"

	"example.com/tableflip/internal/nametable"
)

// The methods in this file claim and add the kinds of descriptors. What they
// promise to callers is documented at the methods of tableflip.Fds.

func (r *Registry) Listen(network, addr string) (net.Listener, error) {
	return r.ListenWithCallback(network, addr, func(network, addr string) (net.Listener, error) {
		return createSocket(r.listenConfig.Listen, network, addr)
	})
}

func (r *Registry) ListenWithCallback(network, addr string, callback func(network, addr string) (net.Listener, error)) (net.Listener, error) {
	return listen(r, network, addr, r.Listener, callback, func(ln net.Listener) error {
		shared, ok := ln.(Listener)
		if !ok {
			return fmt.Errorf("tableflip: listen on %s %s: %T does not implement tableflip.Listener", network, addr, ln)
		}
		return r.AddListener(network, addr, shared, false)
	})
}

func (r *Registry) Listener(network, addr string) (net.Listener, error) {
	return claim(r, nametable.Name{Kind: nametable.Listener, Network: network, Addr: addr}, func(e *entry) (net.Listener, error) {
		ln, err := open(r, e, net.FileListener)
		if err != nil {
			return nil, err
		}
		e.unlinker, _ = ln.(unlinker)
		return withKeepAlive(ln, &r.listenConfig), nil
	})
}

// AddListener takes the place of those of the same name if supersede is set.
func (r *Registry) AddListener(network, addr string, ln Listener, supersede bool) error {
	e := newEntry(nametable.Listener, network, addr)
	return r.add(e, supersede, ln, func() {
		e.describe(ln.Addr(), &r.files)
		if u, ok := ln.(unlinker); ok && e.Path != "" {
			u.SetUnlinkOnClose(false)
			e.unlinker = u
		}
	})
}

func (r *Registry) RemoveListener(network, addr string) error {
	return r.remove(nametable.Name{Kind: nametable.Listener, Network: network, Addr: addr})
}

func (r *Registry) ListenPacket(network, addr string) (net.PacketConn, error) {
	return r.ListenPacketWithCallback(network, addr, func(network, addr string) (net.PacketConn, error) {
		return createSocket(r.listenConfig.ListenPacket, network, addr)
	})
}

func (r *Registry) ListenPacketWithCallback(network, addr string, callback func(network, addr string) (net.PacketConn, error)) (net.PacketConn, error) {
	return listen(r, network, addr, r.PacketConn, callback, func(conn net.PacketConn) error {
		shared, ok := conn.(PacketConn)
		if !ok {
			return fmt.Errorf("tableflip: listen on %s %s: %T does not implement tableflip.PacketConn", network, addr, conn)
		}
		err := r.AddPacketConn(network, addr, shared, false)
		if err != nil {
			// Unlike a listener's, its Close leaves the file.
			var files socketFiles
			created := newEntry(nametable.PacketConn, network, addr)
			created.describe(conn.LocalAddr(), &files)
			r.log(files.unlink(created.Path, created.file))
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
	e := newEntry(nametable.PacketConn, network, addr)
	return r.add(e, supersede, conn, func() { e.describe(conn.LocalAddr(), &r.files) })
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
	return r.add(newEntry(nametable.Conn, network, addr), true, conn, nil)
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
	defer r.mu.Unlock()
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
	return r.add(newEntry(nametable.File, name, ""), true, file, nil)
}

func (r *Registry) RemoveFile(name string) error {
	return r.remove(nametable.Name{Kind: nametable.File, Network: name})
}

func newEntry(kind, network, addr string) *entry {
	return &entry{Entry: &nametable.Entry{Name: nametable.Name{Kind: kind, Network: network, Addr: addr}}}
}

// open returns what package net makes of e's descriptor.
func open[T any](r *Registry, e *entry, fileSocket func(*os.File) (T, error)) (T, error) {
	file, err := r.scratch.File(e.fd)
	if err != nil {
		var none T
		return none, err
	}
	return fileSocket(file)
}

// listen is what all Listen methods do, for either kind of socket.
func listen[T interface {
	comparable
	Close() error
}](r *Registry, network, addr string, claim, create func(network, addr string) (T, error), add func(T) error) (T, error) {
	var none T
	// Not to take an address that the new process may want.
	r.mu.Lock()
	r.waitUnfrozenLocked()
	err := r.closed
	r.mu.Unlock()
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
		return none, fmt.Errorf("tableflip: can't create new socket for %s %s: %w", network, addr, err)
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
