//go:build unix

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/exampletest"
	"example.com/tableflip/internal/proctest"
)

func TestMain(m *testing.M) { exampletest.Main(m) }

// get sends one request on a connection of its own, and never a second time.
func get(s *exampletest.Service) exampletest.ClientFunc {
	return func() (string, error) {
		conn, err := net.Dial("tcp", s.Addr())
		if err != nil {
			return "", err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(proctest.Patience))
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: example\r\nConnection: close\r\n\r\n"); err != nil {
			return "", err
		}
		return readAnswer(conn)
	}
}

func readAnswer(from io.Reader) (string, error) {
	response, err := http.ReadResponse(bufio.NewReader(from), nil)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	if response.StatusCode != http.StatusOK {
		return "", errors.New(response.Status)
	}
	return string(body), nil
}

func TestUpgradeUnderLoad(t *testing.T) {
	s := exampletest.Start(t)
	s.UpgradeUnderLoad(nil, get(s), get(s), get(s), get(s))
}

func TestSurviveFailures(t *testing.T) {
	s := exampletest.Start(t)
	s.SurviveFailures(get(s), get(s), get(s), get(s))
}

func TestAnswerIsExact(t *testing.T) {
	s := exampletest.Start(t)
	got, err := get(s)()
	if want := fmt.Sprintf("version=v1 pid=%d\n", s.PID()); got != want || err != nil {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	s.Stop()
}

// A slowRequest is one that the server is answering, and cannot have answered.
type slowRequest struct {
	t    *testing.T
	conn net.Conn
}

// startSlowRequest sends all of a request but the last byte of its body, which
// net/http reads before it sends the answer of a handler that did not. The body
// is larger than the socket buffers of client and server: when all of it but one
// byte has been written, the server is reading it.
func startSlowRequest(t *testing.T, s *exampletest.Service) *slowRequest {
	t.Helper()
	const size = 250 << 10 // net/http gives up on more than 256 KiB.
	conn, err := net.Dial("tcp", s.Addr())
	proctest.OK(t, err)
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(proctest.Patience))
	proctest.OK(t, conn.(*net.TCPConn).SetWriteBuffer(4<<10))
	_, err = fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: example\r\nContent-Length: %d\r\n\r\n%s",
		size, strings.Repeat("x", size-1))
	proctest.OK(t, err)
	return &slowRequest{t, conn}
}

// finish sends the last byte and returns the answer.
func (r *slowRequest) finish() string {
	r.t.Helper()
	if _, err := r.conn.Write([]byte("x")); err != nil {
		r.t.Fatal(err)
	}
	answer, err := readAnswer(r.conn)
	proctest.OK(r.t, err)
	return answer
}

func TestRequestOutlivesUpgrade(t *testing.T) {
	s := exampletest.Start(t)
	slow := startSlowRequest(t, s)
	s.Install("v2")
	old, inCharge := s.Upgrade()

	// The old process accepts connections until it says that it is draining, and
	// a moment longer.
	fromNew := fmt.Sprintf("version=v2 pid=%d\n", inCharge)
	for timeout := time.After(proctest.Patience); ; {
		got, err := get(s)()
		if got == fromNew {
			break
		}
		proctest.OK(t, err)
		select {
		case <-timeout:
			t.Fatalf("the last new connection got %q, %v, want %q", got, err, fromNew)
		default:
		}
	}
	if got, want := slow.finish(), fmt.Sprintf("version=v1 pid=%d\n", old); got != want {
		t.Errorf("the old connection got %q, want %q", got, want)
	}
	s.AwaitEnd(old, 0)
	s.Await(old, "drained")
	s.Stop()
}

func TestDrainDeadline(t *testing.T) {
	s := exampletest.Start(t, "-drain", "50ms")
	slow := startSlowRequest(t, s)
	pid := s.PID()
	s.Signal(pid, syscall.SIGTERM)
	s.AwaitEnd(pid, 1)
	if failure := s.Await(pid, "exiting")["error"]; !strings.Contains(failure, "50ms after it was stopped") {
		t.Errorf("the process ended with %q", failure)
	}
	if answer, err := readAnswer(slow.conn); err == nil {
		t.Errorf("the request was answered: %q", answer)
	}
}

func TestStopDuringUpgrade(t *testing.T) {
	s := exampletest.Start(t)
	s.Replace("#!/bin/sh\necho level=INFO msg=hanging pid=$$ >&2\nexec sleep 1000\n", 0o755)
	pid := s.PID()
	s.Signal(pid, syscall.SIGHUP)
	child, err := strconv.Atoi(s.Await(0, "hanging")["pid"])
	proctest.OK(t, err)
	s.Stop()
	if failure := s.Await(pid, "upgrade failed")["error"]; failure != tableflip.ErrStopped.Error() && !strings.Contains(failure, "stopped by terminated") {
		t.Errorf("the upgrade failed with %q, want that it was stopped", failure)
	}
	s.AwaitKilled(child, syscall.SIGKILL)
}

func TestReplacedIsInterrupted(t *testing.T) {
	s := exampletest.Start(t)
	startSlowRequest(t, s)
	old, _ := s.Upgrade()
	s.Await(old, "draining")
	s.Interrupt(old)
	s.Stop()
}

func TestStoppedIsInterrupted(t *testing.T) {
	s := exampletest.Start(t)
	startSlowRequest(t, s)
	pid := s.PID()
	s.Signal(pid, syscall.SIGTERM)
	s.Await(pid, "draining")
	s.Interrupt(pid)
}

func TestSIGINTStops(t *testing.T) {
	s := exampletest.Start(t)
	pid := s.PID()
	s.Signal(pid, syscall.SIGINT)
	s.AwaitEnd(pid, 0)
	s.Await(pid, "drained")
}
