//go:build unix

package systemd

import (
	"context"
	"errors"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/proctest"
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
	proctest.Set(t, &send, func(fd uintptr, message, rights []byte) error {
		if attempts--; attempts >= 0 {
			return os.NewSyscallError("sendmsg", syscall.ENOBUFS)
		}
		return descriptor.Send(fd, message, rights)
	})
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
	proctest.Set(t, &NotifyTimeout, 20*time.Millisecond)
	n, _ := manager(t)
	refuse(t, 1<<30)
	if err := n.send(nil, "READY=1"); !errors.Is(err, syscall.ENOBUFS) {
		t.Errorf("got %v", err)
	}
}

// The longest trial is one without an end.
func TestNotifierOnTrial(t *testing.T) {
	n, conn := manager(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	n.OnTrial(ctx, 5, math.MaxInt64, time.Minute)
	message := make([]byte, 1000)
	size, err := conn.Read(message)
	if err != nil || !strings.HasPrefix(string(message[:size]), "EXTEND_TIMEOUT_USEC=9223372096854775\n") {
		t.Errorf("the manager got %q, %v", message[:size], err)
	}
}

// The manager may forget the first message, and learns of what is left.
func TestNotifierOnTrialAgain(t *testing.T) {
	proctest.Set(t, &ExtendInterval, time.Millisecond)
	n, conn := manager(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.OnTrial(ctx, 5, time.Minute, time.Hour)
	}()
	if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	message := make([]byte, 1000)
	last := (time.Minute + time.Hour).Microseconds()
	for i := range 3 {
		size, err := conn.Read(message)
		text, status, _ := strings.Cut(string(message[:size]), "\n")
		digits, isExtended := strings.CutPrefix(text, "EXTEND_TIMEOUT_USEC=")
		left, _ := strconv.ParseInt(digits, 10, 64)
		if isLess := left < last; err != nil || !isExtended || left < time.Hour.Microseconds() || isLess != (i > 0) || (status != "") != (i == 0) {
			t.Errorf("the manager got %q, %v after %d", message[:size], err, last)
		}
		last = left
	}
	cancel()
	<-done
}
