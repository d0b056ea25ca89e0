//go:build unix

package systemd

import (
	"errors"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/descriptor"
)

// manager returns a Notifier, and the socket that it notifies.
func manager(t *testing.T) (*Notifier, *net.UnixConn) {
	t.Helper()
	// Not t.TempDir, which can be too long for a socket.
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	addr := &net.UnixAddr{Net: "unixgram", Name: filepath.Join(dir, "notify")}
	conn, err := net.ListenUnixgram("unixgram", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return &Notifier{addr: addr}, conn
}

// refuse has the manager's queue be full for so many attempts, as on the BSDs.
func refuse(t *testing.T, attempts int) {
	send = func(fd uintptr, message, rights []byte) error {
		if attempts--; attempts >= 0 {
			return os.NewSyscallError("sendmsg", syscall.ENOBUFS)
		}
		return descriptor.Send(fd, message, rights)
	}
	t.Cleanup(func() { send = descriptor.Send })
}

func TestNotifierQueueFull(t *testing.T) {
	n, conn := manager(t)
	refuse(t, 3)
	if err := n.send(nil, "READY=1"); err != nil {
		t.Fatal(err)
	}
	message := make([]byte, 100)
	if size, err := conn.Read(message); err != nil || string(message[:size]) != "READY=1" {
		t.Errorf("the manager got %q, %v", message[:size], err)
	}
}

func TestNotifierQueueStaysFull(t *testing.T) {
	before := NotifyTimeout
	NotifyTimeout = 20 * time.Millisecond
	t.Cleanup(func() { NotifyTimeout = before })
	n, _ := manager(t)
	refuse(t, 1<<30)
	if err := n.send(nil, "READY=1"); !errors.Is(err, syscall.ENOBUFS) {
		t.Errorf("got %v", err)
	}
}

// The longest trial is one without an end.
func TestNotifierOnTrial(t *testing.T) {
	n, conn := manager(t)
	n.OnTrial(5, math.MaxInt64, time.Minute)
	message := make([]byte, 1000)
	size, err := conn.Read(message)
	if err != nil || !strings.HasPrefix(string(message[:size]), "EXTEND_TIMEOUT_USEC=9223372096854775\n") {
		t.Errorf("the manager got %q, %v", message[:size], err)
	}
}
