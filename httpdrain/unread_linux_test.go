package httpdrain_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/httpdrain"
	"example.com/tableflip/internal/proctest"
)

// suspendedGrace is the grace of a process that is suspended for longer.
const suspendedGrace = 50 * time.Millisecond

// TestUnreadOfSuspended suspends a process for longer than its grace. What has come by then
// is served, because the kernel is asked before a connection is closed.
func TestUnreadOfSuspended(t *testing.T) {
	if addr := os.Getenv("SUSPENDED"); addr != "" {
		network, addr, _ := strings.Cut(addr, " ")
		if err := drainSuspended(network, addr); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, at := range []string{"unix " + filepath.Join(t.TempDir(), "socket"), "tcp 127.0.0.1:0"} {
		network, _, _ := strings.Cut(at, " ")
		cmd := exec.Command(os.Args[0], "-test.run=^TestUnreadOfSuspended$")
		cmd.Env = append(os.Environ(), "SUSPENDED="+at)
		cmd.Stderr = os.Stderr
		stdin := proctest.Opened[io.WriteCloser](t)(cmd.StdinPipe())
		stdout := proctest.Opened[io.ReadCloser](t)(cmd.StdoutPipe())
		proctest.OK(t, cmd.Start())
		t.Cleanup(func() { cmd.Process.Kill() })
		addr, err := bufio.NewReader(stdout).ReadString('\n')
		proctest.OK(t, err)
		c := newClient(t, proctest.Opened[net.Conn](t)(net.Dial(network, strings.TrimSpace(addr))))
		c.get("/").more(t, "hello")
		stdin.Close()
		proctest.AwaitStop(t, cmd.Process.Pid)
		c.send(post("/", "body"))
		time.Sleep(2 * suspendedGrace) // otherwise nothing is shown
		proctest.Continue(t, cmd.Process.Pid)
		c.answer().last(t, "hello")
		c.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: the process: %v", network, err)
		}
	}
}

// drainSuspended serves until the standard input ends, and drains. It is suspended when the
// drain has begun, and before a connection is looked at.
func drainSuspended(network, addr string) error {
	ln, err := net.Listen(network, addr)
	if err != nil {
		return err
	}
	d := httpdrain.New(&http.Server{Handler: http.HandlerFunc(hello)})
	d.IdleGrace = suspendedGrace
	d.Logger = slog.New(&suspender{Handler: slog.NewTextHandler(io.Discard, nil)})
	go d.Serve(ln)
	fmt.Println(ln.Addr())
	io.Copy(io.Discard, os.Stdin)
	return d.Shutdown(context.Background())
}

// A suspender suspends the process when the first record is logged.
type suspender struct {
	slog.Handler
	once sync.Once
}

func (s *suspender) Handle(context.Context, slog.Record) (err error) {
	s.once.Do(func() {
		runtime.LockOSThread() // by its own signal a thread is stopped before it goes on
		defer runtime.UnlockOSThread()
		err = unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGSTOP)
	})
	return err
}
