package pidfile

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
)

// A container's PID file may be mounted on a file of the host.
func TestFileMounted(t *testing.T) {
	dir := t.TempDir()
	host := filepath.Join(dir, "host")
	f := &File{path: filepath.Join(dir, "pid")}
	for _, path := range []string{host, f.path} {
		proctest.OK(t, os.WriteFile(path, []byte("1"), 0o600))
	}
	if err := unix.Mount(host, f.path, "", unix.MS_BIND, ""); err != nil {
		t.Skip("only root can mount, and not in most containers:", err)
	}
	t.Cleanup(func() { proctest.OK(t, unix.Unmount(f.path, unix.MNT_DETACH)) })

	err := f.Write()
	proctest.WantError(t, "write", err, syscall.EBUSY)
	if !strings.Contains(err.Error(), "mount its directory instead") {
		t.Errorf("got %v, without advice", err)
	}
	wantFiles(t, dir, map[string]string{"host": "1", "pid": "1"})

	proctest.OK(t, os.WriteFile(f.path, ownPID(), 0o600))
	proctest.WantError(t, "remove", f.Remove(), syscall.EBUSY)
}
