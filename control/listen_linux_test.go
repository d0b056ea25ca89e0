package control

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// Nobody can connect before the mode keeps strangers out.
func TestListenAfterChmod(t *testing.T) {
	fd, err := newSocket()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ctl")
	file := os.NewFile(uintptr(fd), path)
	defer file.Close()
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if ln, err := open(file, path); err == nil {
		ln.Close()
		t.Error("the mode of no file was changed")
	}
	if accepts, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN); err != nil || accepts != 0 {
		t.Errorf("SO_ACCEPTCONN is %d, %v", accepts, err)
	}
}

// A listener is one descriptor, and unlinks its file when it is closed.
func TestListenCloses(t *testing.T) {
	opened := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	path := filepath.Join(t.TempDir(), "ctl")
	before := opened()
	ln, err := listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if after := opened(); after != before+1 {
		t.Errorf("%d descriptors are open, and %d were", after, before)
	}
	ln.Close()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the file: %v", err)
	}
}
