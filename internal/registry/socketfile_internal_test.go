//go:build unix

package registry

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"example.com/tableflip/internal/proctest"
)

// A process that does not call LockDir has bound the path after it was found dead.
func TestUnlinkAsidePutsBack(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	ln := proctest.Opened[net.Listener](t)(net.Listen("unix", path))
	before := proctest.Must(os.Lstat(path))
	if unlinkAside(path) {
		t.Error("a socket that is open was unlinked")
	}
	if now, err := os.Lstat(path); err != nil || !os.SameFile(before, now) {
		t.Errorf("it is not where it was: %v", err)
	}
	proctest.Dial(t, 1, ln.Addr())
	proctest.Opened[net.Conn](t)(ln.Accept())
	if left := proctest.Must(os.ReadDir(filepath.Dir(path))); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}
