//go:build unix

package handovertest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// These tests are about descriptors that a child inherits and does not claim.

func TestUnclaimed(t *testing.T) {
	dir := proctest.SocketDir(t)
	path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
	upg, s := NewParent(t, tableflip.Options{}, "claim-nothing")
	tcp := proctest.Must(upg.Listen("tcp", "localhost:0"))
	local := proctest.Must(upg.Listen("unix", path))
	packets := proctest.Must(upg.ListenPacket("unixgram", gram))
	server, client := proctest.Connect(t)
	proctest.OK(t, upg.AddConn("tcp", "a", server))
	proctest.OK(t, upg.AddFile("a", os.Stderr))
	proctest.During(t, step.BeforeCommit, func() {
		proctest.Dial(t, 1, tcp.Addr())
		proctest.Dial(t, 1, local.Addr())
		proctest.Opened[net.Conn](t)(net.Dial("unixgram", gram))
		proctest.WantOpen(t, "connection", client, server)
	})
	Upgrade(t, upg)
	for _, socket := range []io.Closer{tcp, local, packets, server} {
		socket.Close()
	}
	logged := s.Await("ready").Text
	for _, want := range []string{
		`"listener:tcp:localhost:0"`, `"listener:unix:` + path + `"`, `"packet:unixgram:` + gram + `"`, `"conn:tcp:a"`, `"fd:a:"`,
	} {
		if strings.Count(logged, want[1:len(want)-1]) != 1 {
			t.Errorf("%s is not logged once: %s", want, logged)
		}
	}
	if strings.Count(logged, "level=WARN") != 5 {
		t.Errorf("logged %s", logged)
	}
	if proctest.Exists(path) || proctest.Exists(gram) {
		t.Error("the sockets that nobody claimed are not unlinked")
	}
	proctest.WantRefused(t, "listener", "tcp", tcp.Addr().String())
	proctest.WantEOF(t, "connection", client)
}

func init() {
	proctest.Role("claim-nothing", func() {
		var log bytes.Buffer
		upg := proctest.Must(tableflip.New(tableflip.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}))
		MustBeReady(upg)
		proctest.Report("ready", log.String())
		proctest.UntilKilled()
	})
}

// A child that binds its parent's paths without claiming its sockets keeps its own.
func TestUnclaimedBoundAnew(t *testing.T) {
	dir := proctest.SocketDir(t)
	path, gram := filepath.Join(dir, "s"), filepath.Join(dir, "gram")
	upg, s := NewParent(t, tableflip.Options{}, "bind-anew", proctest.WithArg(dir))
	proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	proctest.Opened[net.PacketConn](t)(upg.ListenPacket("unixgram", gram))
	Upgrade(t, upg)
	child := s.Await("ready")
	if got := proctest.Answer(t, "unix", path); got != "anew" {
		t.Errorf("the answer is %q", got)
	}
	proctest.Opened[net.Conn](t)(net.Dial("unixgram", gram))
	proctest.Terminate(t, child.PID)
	s.AwaitEnd()
	if proctest.Exists(path) || proctest.Exists(gram) {
		t.Error("Stop has not unlinked the child's own sockets")
	}
}

func init() {
	proctest.Role("bind-anew", func() {
		terminated := proctest.Terminated()
		path, gram := filepath.Join(proctest.Arg(), "s"), filepath.Join(proctest.Arg(), "gram")
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Must(0, errors.Join(os.Remove(path), os.Remove(gram)))
		ln := proctest.Must(net.Listen("unix", path)).(*net.UnixListener)
		packets := proctest.Must(net.ListenPacket("unixgram", gram)).(*net.UnixConn)
		proctest.Must(0, upg.AddListener("unix", "my "+path, ln))
		proctest.Must(0, upg.AddPacketConn("unixgram", "my "+gram, packets))
		MustBeReady(upg)
		proctest.Report("ready")
		go func() {
			conn := proctest.Must(ln.Accept())
			proctest.Must(io.WriteString(conn, "anew"))
			conn.Close()
		}()
		<-terminated
		upg.Stop()
	})
}

// A descriptor that was removed before Ready counts as unclaimed.
func TestUnclaimedRemoved(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg, s := NewParent(t, tableflip.Options{}, "remove-before-ready", proctest.WithArg(path))
	local := proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	proctest.During(t, step.BeforeCommit, func() { proctest.Dial(t, 1, local.Addr()) })
	Upgrade(t, upg)
	if m := s.Await("exists"); m.Text != "true false" {
		t.Errorf("the socket exists before and after Ready: %s", m.Text)
	}
}

func init() {
	proctest.Role("remove-before-ready", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		ln := proctest.Must(upg.Listen("unix", proctest.Arg()))
		proctest.Must(0, upg.RemoveListener("unix", proctest.Arg()))
		ln.Close()
		before := proctest.Exists(proctest.Arg())
		MustBeReady(upg)
		proctest.Report("exists", before, proctest.Exists(proctest.Arg()))
	})
}

// A descriptor that was replaced before Ready counts as unclaimed.
func TestUnclaimedReplaced(t *testing.T) {
	dir := proctest.SocketDir(t)
	path, next := filepath.Join(dir, "s"), filepath.Join(dir, "next")
	upg, s := NewParent(t, tableflip.Options{}, "replace-before-ready", proctest.WithArg(path+"\n"+next))
	local := proctest.Opened[net.Listener](t)(upg.Listen("unix", path))
	proctest.During(t, step.BeforeCommit, func() { proctest.Dial(t, 1, local.Addr()) })
	Upgrade(t, upg)
	if m := s.Await("exists"); m.Text != "true true false true" {
		t.Errorf("the old and the new socket exist before and after Ready: %s", m.Text)
	}
}

func init() {
	proctest.Role("replace-before-ready", func() {
		path, next, _ := strings.Cut(proctest.Arg(), "\n")
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		old := proctest.Must(upg.Listener("unix", path))
		proctest.Must(0, upg.AddListener("unix", path, proctest.Must(net.Listen("unix", next)).(*net.UnixListener)))
		old.Close()
		before := []any{proctest.Exists(path), proctest.Exists(next)}
		MustBeReady(upg)
		proctest.Report("exists", append(before, proctest.Exists(path), proctest.Exists(next))...)
	})
}

// What nobody claimed can be bound anew once the parent, which may serve it, has ended.
func TestUnclaimedBoundLater(t *testing.T) {
	s, parent := proctest.Start(t, "bind-later")
	if m := s.Await("bound"); !strings.Contains(m.Text, "claim it before Ready") {
		t.Errorf("beside the parent, Listen returned %s", m.Text)
	}
	proctest.Terminate(t, parent.Process.Pid)
	s.Await("bound-later")
}

func init() {
	proctest.Role("bind-later", func() {
		terminated := proctest.Terminated()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		if !upg.HasParent() {
			ln := proctest.Must(upg.Listen("tcp", "127.0.0.1:0"))
			proctest.SetArg(ln.Addr().String())
			MustBeReady(upg)
			proctest.Must(0, upg.Upgrade())
			<-terminated
			return
		}
		MustBeReady(upg)
		proctest.Report("bound", proctest.ErrorOf(upg.Listen("tcp", proctest.Arg())))
		proctest.Must(0, upg.WaitForParent(context.Background()))
		for proctest.ErrorOf(upg.Listen("tcp", proctest.Arg())) != nil {
			time.Sleep(time.Millisecond) // a poll
		}
		proctest.Report("bound-later")
	})
}
