//go:build unix

package control_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/control"
	"example.com/tableflip/internal/proctest"
	stub "example.com/tableflip/testing"
)

func (s *service) wantMode() {
	s.t.Helper()
	info, err := os.Stat(s.socket)
	proctest.OK(s.t, err)
	if mode := info.Mode().Perm(); mode != 0o600 {
		s.t.Errorf("the mode of the socket is %o, want 600", mode)
	}
}

func (s *service) upgrade() {
	s.t.Helper()
	s.current.Order("upgrade")
	s.adopt().AwaitEnd()
}

// The file is gone, or another socket has it: upgrades go on, and bring it back if they
// can.
func TestSocketRemoved(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	s := start(t)
	s.wantMode()
	proctest.OK(t, os.Remove(s.socket))
	s.wantExit(s.ctl("upgrade"), 2, "nobody answers")
	s.upgrade()
	s.wantInCharge()
	s.wantMode()

	proctest.OK(t, os.Remove(s.socket))
	other := proctest.Opened[net.Listener](t)(net.Listen("unix", s.socket))
	s.upgrade()
	other.Close()
	s.wantExit(s.ctl("status"), 2, "nobody answers")
	s.upgrade()
	s.wantInCharge()
	s.wantMode()
}

// What a service that was killed has left is replaced.
func TestSocketLeft(t *testing.T) {
	s := start(t)
	proctest.Kill(t, s.current.PID, syscall.SIGKILL)
	s.current.AwaitEnd()
	s.wantExit(s.ctl("status"), 2, "refused")
	s.Start(s.Command("serve", s.Wire(), proctest.WithArg(s.directory)))
	s.adopt()
	s.wantInCharge()
	s.wantMode()
}

func TestSocketTaken(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "ctl")
	proctest.Opened[net.Listener](t)(net.Listen("unix", path))
	upg, _ := stub.New()
	_, err := control.New(upg, path, control.Options{})
	proctest.WantError(t, "New", err, syscall.EADDRINUSE)
	for _, path := range []string{"", "@abstract"} {
		if _, err := control.New(upg, path, control.Options{}); err == nil || !strings.Contains(err.Error(), "not the path of a file") {
			t.Errorf("New(%q): %v", path, err)
		}
	}
}

// strangerRole asks as another user, and prints what it is told.
func strangerRole() {
	proctest.Must(0, errors.Join(syscall.Setgid(65534), syscall.Setuid(65534)))
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", proctest.Arg())
	}}}
	response, err := client.Get("http://control/status")
	if errors.Is(err, os.ErrPermission) {
		fmt.Println("permission denied")
		return
	}
	content := proctest.Must(io.ReadAll(proctest.Must(response, err).Body))
	fmt.Print(response.StatusCode, " ", string(content))
}

func init() { proctest.Role("stranger", strangerRole) }

func (s *service) asksAsStranger() string {
	cmd := s.Command("stranger", proctest.WithArg(s.socket))
	cmd.Stdout = nil
	return string(proctest.Must(cmd.Output()))
}

func TestSocketStranger(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can become another user")
	}
	s := start(t)
	proctest.OK(t, os.Chmod(s.directory, 0o711))
	if got := s.asksAsStranger(); got != "permission denied\n" {
		t.Errorf("a stranger was told %q", got)
	}
	proctest.OK(t, os.Chmod(s.socket, 0o666))
	if got := s.asksAsStranger(); got != "403 only the service's user and root may ask\n" {
		t.Errorf("a stranger was told %q", got)
	}
	s.wantInCharge()
}

// unprivilegedRole is a service of another user than root.
func unprivilegedRole() {
	proctest.Must(0, errors.Join(syscall.Setgid(65534), syscall.Setuid(65534)))
	upg := proctest.Must(stub.New())
	ctl := proctest.Must(control.New(upg, proctest.Arg(), control.Options{}))
	go ctl.Serve()
	proctest.Report("serves")
	proctest.UntilKilled()
}

func init() { proctest.Role("unprivileged", unprivilegedRole) }

// A service of another user than root answers that user, and root.
func TestSocketUnprivileged(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can become another user")
	}
	directory := proctest.SocketDir(t)
	proctest.OK(t, os.Chown(directory, 65534, 65534))
	s := &service{Service: proctest.NewService(t), t: t, socket: filepath.Join(directory, "ctl")}
	s.Start(s.Command("unprivileged", proctest.WithArg(s.socket)))
	s.Await("serves")
	s.want(s.ask(t.Context(), http.MethodGet, "/status"), http.StatusOK)
	if got := s.asksAsStranger(); !strings.HasPrefix(got, "200 ") {
		t.Errorf("the service's user was told %q", got)
	}
}

// Whoever asks while the service is upgraded is answered, by the old process or the new
// one.
func TestSocketUnderUpgrades(t *testing.T) {
	s := start(t)
	const clients, each = 20, 50
	var asked sync.WaitGroup
	var answered atomic.Int32
	for range clients {
		asked.Go(func() {
			for range each {
				if a := s.ask(t.Context(), http.MethodGet, "/status"); a.err != nil || a.code != http.StatusOK {
					t.Errorf("answered %d %q, %v", a.code, a.text, a.err)
				}
				answered.Add(1)
			}
		})
	}
	upgrades := 0
	for ended := proctest.Waited(&asked); !proctest.IsClosed(ended); upgrades++ {
		s.want(s.ask(t.Context(), http.MethodPost, "/upgrade?wait"), http.StatusOK)
		s.adopt()
	}
	t.Logf("%d answers during %d upgrades", answered.Load(), upgrades)
}

// Clients that have connected, and ask nothing, hold nothing up.
func TestSocketIdleClients(t *testing.T) {
	s := start(t, impatient+"=1")
	var idle []net.Conn
	for range 63 {
		idle = append(idle, proctest.Opened[net.Conn](t)(net.Dial("unix", s.socket)))
	}
	s.want(s.ask(t.Context(), http.MethodPost, "/upgrade"), http.StatusOK)
	s.adopt().AwaitEnd()
	s.wantInCharge()
	for _, conn := range idle {
		proctest.WantEOF(t, "an idle client", conn)
	}
}

// Once a process is replaced, its successor alone accepts.
func TestSocketAfterUpgrade(t *testing.T) {
	s := start(t)
	output, _ := s.ctlOutput("events")
	output.Await("watching")
	s.setFlaw("drain")
	s.current.Order("upgrade")
	old := s.adopt()
	output.Await("draining connections=3", fmt.Sprint("pid=", old.PID))

	proctest.Suspend(t, s.current.PID)
	conn := proctest.Opened[net.Conn](t)(net.Dial("unix", s.socket))
	io.WriteString(conn, "GET /status HTTP/1.0\r\n\r\n")
	// The old process has time to answer, which it must not use.
	conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	_, err := conn.Read(make([]byte, 1))
	proctest.WantError(t, "the answer while the new process is suspended", err, os.ErrDeadlineExceeded)
	proctest.Continue(t, s.current.PID)
	if got := proctest.Answers(t, []net.Conn{conn})[0]; !strings.Contains(got, fmt.Sprintf("process %d, generation 2, is in charge", s.current.PID)) {
		t.Errorf("answered %q, want it by %d", got, s.current.PID)
	}
	old.Order("drained")
	old.AwaitEnd()
}

// A patientUpgrader upgrades for as long as its caller waits.
type patientUpgrader struct{ *stub.Upgrader }

func (patientUpgrader) UpgradeContext(ctx context.Context) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

// Close cuts who has asked for what does not end.
func TestCloseCuts(t *testing.T) {
	t.Cleanup(control.SetPatience(shortPatience))
	socket := filepath.Join(proctest.SocketDir(t), "ctl")
	upg, _ := stub.New()
	ctl, err := control.New(patientUpgrader{upg}, socket, control.Options{})
	proctest.OK(t, err)
	go ctl.Serve()
	conn := proctest.Opened[net.Conn](t)(net.Dial("unix", socket))
	io.WriteString(conn, "POST /upgrade HTTP/1.0\r\n\r\n")
	s := &service{t: t, socket: socket}
	s.want(s.ask(t.Context(), http.MethodGet, "/status"), http.StatusOK) // it was accepted before
	proctest.Within(t, "Close", proctest.InBackground(func() bool { ctl.Close(); return true }))
	proctest.WantEOF(t, "who has asked", conn)
}

// What is asked of a process that was replaced, by who had connected before, is answered.
func TestSocketLateQuestion(t *testing.T) {
	s := start(t)
	late := map[string]net.Conn{}
	for _, question := range []string{"GET /status", "POST /upgrade", "POST /stop"} {
		late[question] = proctest.Opened[net.Conn](t)(net.Dial("unix", s.socket))
	}
	s.setFlaw("drain")
	s.want(s.ask(t.Context(), http.MethodPost, "/upgrade"), http.StatusOK) // they were accepted first
	old := s.adopt()
	for question, says := range map[string]string{
		"GET /status":   "200 OK",
		"POST /upgrade": "409 Conflict",
		"POST /stop":    "409 Conflict",
	} {
		fmt.Fprintf(late[question], "%s HTTP/1.0\r\n\r\n", question)
		if got := proctest.Answers(t, []net.Conn{late[question]})[0]; !strings.Contains(got, says) {
			t.Errorf("%s: answered %q, want %s", question, got, says)
		}
	}
	old.Order("drained")
	old.AwaitEnd()
	s.wantInCharge()
}

func TestStop(t *testing.T) {
	s := start(t)
	s.setFlaw("drain")
	s.want(s.ask(t.Context(), http.MethodPost, "/stop"), http.StatusOK, fmt.Sprintf("process %d stops", s.current.PID))
	s.wantExit(s.ctl("status"), 2, "nobody answers")
	s.current.Order("drained")
	s.current.AwaitEnd()
	if proctest.Exists(s.socket) {
		t.Error("the socket's file is left")
	}
}
