//go:build unix

package registry_test

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/registry"
)

// What happens while something takes long.

// A fakeStore's Flush blocks until the test receives from flushing.
type fakeStore struct {
	mu       sync.Mutex
	told     []string
	refused  []string // what Flush says could not be kept
	flushes  int
	flushing chan struct{}
}

func (s *fakeStore) Keep(e *nametable.Entry, _ uintptr) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.FDName != "" || e.Kind != nametable.Listener && e.Kind != nametable.PacketConn {
		return e.FDName
	}
	s.told = append(s.told, "keep "+e.Addr)
	return nametable.StoreName(e.Name)
}

func (s *fakeStore) Remove(fdName string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, _ := nametable.ParseStoreName(fdName)
	s.told = append(s.told, "remove "+n.Addr)
}

func (s *fakeStore) Flush() []string {
	if s.flushing != nil {
		s.flushing <- struct{}{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flushes++
	refused := s.refused
	s.refused = nil
	return refused
}

// A store that is stuck blocks the caller that changed it, and no other.
func TestStuckStore(t *testing.T) {
	store := &fakeStore{}
	r := firstGeneration(t, registry.Options{Store: store})
	r.OpenStore()
	store.flushing = make(chan struct{})
	listening := proctest.InBackground(func() error { return proctest.ErrorOf(r.Listen("tcp", "127.0.0.1:0")) })
	proctest.Within(t, "the first Flush", store.flushing) // the next call is stuck
	proctest.OK(t, proctest.Within(t, "Listen", listening))
	stuck := proctest.InBackground(func() error { return proctest.ErrorOf(r.Listen("tcp", "127.0.0.2:0")) })

	server, _ := proctest.Connect(t)
	others := proctest.InBackground(func() error {
		for _, err := range []error{
			r.AddFile("a", os.Stderr), r.RemoveFile("a"), r.AddConn("tcp", "a", server), r.RemoveConn("tcp", "a"),
			proctest.ErrorOf(r.Files()), proctest.ErrorOf(r.Listener("tcp", "x")),
		} {
			if err != nil {
				return err
			}
		}
		r.Unfreeze()
		r.TakeCharge()
		return nil
	})
	proctest.OK(t, proctest.Within(t, "what the store does not care for", others))
	if proctest.IsClosed(stuck) {
		t.Error("Listen did not wait for the store")
	}
	proctest.Within(t, "the second Flush", store.flushing)
	proctest.OK(t, proctest.Within(t, "Listen", stuck))

	// When Stop has returned, the process may exit.
	stopped := proctest.InBackground(func() bool { r.Stop(true, errStopped); return true })
	proctest.Within(t, "the last Flush", store.flushing)
	proctest.Within(t, "Stop", stopped)
	store.flushing = nil
	want := []string{"keep 127.0.0.1:0", "keep 127.0.0.2:0", "remove 127.0.0.1:0", "remove 127.0.0.2:0"}
	if !slices.Equal(store.told, want) {
		t.Errorf("the store was told %q, want %q", store.told, want)
	}
}

// The child is not told of a copy that could not be made.
func TestRefusedCopies(t *testing.T) {
	store := &fakeStore{}
	r := firstGeneration(t, registry.Options{Store: store})
	r.OpenStore()
	proctest.OK(t, proctest.ErrorOf(r.Listen("tcp", "127.0.0.1:0")))
	proctest.OK(t, proctest.ErrorOf(r.Listen("tcp", "127.0.0.2:0")))
	store.refused = []string{nametable.StoreName(nametable.Name{Kind: nametable.Listener, Network: "tcp", Addr: "127.0.0.2:0"})}
	entries, _, release, err := r.FreezeForChild()
	proctest.OK(t, err)
	release()
	r.Unfreeze()
	if entries[0].FDName == "" || entries[1].FDName != "" {
		t.Errorf("the child is told of the copies %q and %q", entries[0].FDName, entries[1].FDName)
	}
}

// When a method has returned, a crash finds in the store what it has changed.
func TestChangesAreFlushed(t *testing.T) {
	store := &fakeStore{}
	r := firstGeneration(t, registry.Options{Store: store})
	r.OpenStore()
	for _, change := range []struct {
		what string
		call func() error
	}{
		{"Listen", func() error { return proctest.ErrorOf(r.Listen("tcp", "127.0.0.1:0")) }},
		{"ListenPacket", func() error { return proctest.ErrorOf(r.ListenPacket("udp", "127.0.0.1:0")) }},
		{"RemoveListener", func() error { return r.RemoveListener("tcp", "127.0.0.1:0") }},
		{"RemovePacketConn", func() error { return r.RemovePacketConn("udp", "127.0.0.1:0") }},
	} {
		before := store.flushes
		proctest.OK(t, change.call())
		if store.flushes == before {
			t.Errorf("%s returned without a flush", change.what)
		}
	}
}

// A callingHandler has the logger call into the registry.
type callingHandler struct {
	slog.Handler
	call func()
}

func (*callingHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *callingHandler) Handle(context.Context, slog.Record) error { h.call(); return nil }

// A Logger's handler may call into the registry.
func TestLoggerMayCall(t *testing.T) {
	dir := proctest.SocketDir(t)
	handler := &callingHandler{call: func() {}}
	opts := registry.Options{Logger: slog.New(handler)}
	calls := 0
	r := firstGeneration(t, opts)
	for _, name := range []string{"unclaimed", "claimed"} {
		proctest.OK(t, proctest.ErrorOf(r.Listen("unix", filepath.Join(dir, name))))
	}
	c := child(t, r, opts)
	handler.call = func() {
		calls++
		c.Unfreeze() // it locks
		_, _ = c.Listener("tcp", "x")
		_ = c.AddFile("a", os.Stderr)
		_ = c.RemoveFile("a")
	}
	done := proctest.InBackground(func() error {
		_, err := c.ListenWithCallback("unix", filepath.Join(dir, "claimed"), nil)
		c.TakeCharge()
		_, _ = c.ListenWithCallback("tcp", "localhost:0", func(network, addr string) (net.Listener, error) {
			ln, err := net.Listen(network, addr)
			return hidesUnlink{ln}, err
		})
		c.Stop(true, errStopped)
		return err
	})
	proctest.OK(t, proctest.Within(t, "a Logger that calls into the registry", done))
	if calls < 2 {
		t.Errorf("the logger was called %d times", calls)
	}
}
