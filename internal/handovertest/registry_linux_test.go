package handovertest

import (
	"net"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// Clients see the credentials of the process in charge, and of no other.
func TestRegistryPeer(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg, s := NewParent(t, tableflip.Options{}, "listen-at", proctest.WithArg("unix "+path))
	proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	before := peer(t, path)
	proctest.During(t, step.BeforeCommit, func() {
		if now := peer(t, path); now != before {
			t.Errorf("before the commit clients see %d, not %d", now, before)
		}
	})
	Upgrade(t, upg)
	child := s.Await("ready")
	if now := peer(t, path); int(now) != child.PID {
		t.Errorf("clients see %d, want the child, %d", now, child.PID)
	}
}

// peer returns the process that a client takes for the one that listens.
func peer(t *testing.T, path string) int32 {
	t.Helper()
	conn := proctest.Opened[net.Conn](t)(net.Dial("unix", path))
	raw, err := conn.(*net.UnixConn).SyscallConn()
	proctest.OK(t, err)
	var ucred *unix.Ucred
	proctest.OK(t, raw.Control(func(fd uintptr) {
		ucred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}))
	proctest.OK(t, err)
	return ucred.Pid
}
