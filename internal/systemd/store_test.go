//go:build unix

package systemd

import (
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"example.com/tableflip/internal/nametable"
)

// stored returns a name of which the store's is so long, and a descriptor for it.
func stored(t *testing.T, length int) (*nametable.Entry, uintptr) {
	t.Helper()
	name := nametable.Name{Kind: nametable.Listener, Network: "unix"}
	name.Addr = strings.Repeat("a", length-len(nametable.StoreName(name)))
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return &nametable.Entry{Name: name}, file.Fd()
}

func TestStoreLongestName(t *testing.T) {
	n, conn := manager(t)
	s := n.NewStore(true)
	for length, want := range map[int]bool{255: true, 256: false} {
		fdName := s.Keep(stored(t, length))
		if (fdName != "") != want {
			t.Errorf("a name of %d bytes is kept as %q", length, fdName)
		}
	}
	if failed := s.Flush(); len(failed) != 0 {
		t.Errorf("%q have failed", failed)
	}
	message := make([]byte, 1000)
	if size, err := conn.Read(message); err != nil || !strings.HasPrefix(string(message[:size]), "FDSTORE=1\n") {
		t.Errorf("the manager got %q, %v", message[:size], err)
	}
}

// Flush says once which copies the manager has not got. What it was only to close is none.
func TestStoreFails(t *testing.T) {
	n := &Notifier{addr: &net.UnixAddr{Net: "unixgram", Name: "/nonexistent/notify"}}
	s := n.NewStore(true)
	fdName := s.Keep(stored(t, 50))
	s.Remove("tableflip,other")
	if failed := s.Flush(); !slices.Equal(failed, []string{fdName}) {
		t.Errorf("%q have failed, want %q", failed, fdName)
	}
	if failed := s.Flush(); failed != nil {
		t.Errorf("%q have failed again", failed)
	}
}
