//go:build unix

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/exampletest"
	"example.com/tableflip/internal/proctest"
)

func TestMain(m *testing.M) { exampletest.Main(m) }

// A client is one connection.
type client struct {
	net.Conn
	lines   *bufio.Scanner
	closing bool // the server has said so
}

func dial(s *exampletest.Service) (*client, error) {
	conn, err := net.Dial("tcp", s.Addr())
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(proctest.Patience))
	return &client{Conn: conn, lines: bufio.NewScanner(conn)}, nil
}

// next returns the next line that is not "closing", or io.EOF.
func (c *client) next() (string, error) {
	for c.lines.Scan() {
		if line := c.lines.Text(); line != "closing" {
			return line, nil
		}
		if c.closing {
			return "", errors.New(`got a second "closing"`)
		}
		c.closing = true
	}
	if err := c.lines.Err(); err != nil {
		return "", err
	}
	return "", io.EOF
}

// ask sends a line and returns its answer.
func (c *client) ask(line string) (string, error) {
	if _, err := fmt.Fprintln(c, line); err != nil {
		return "", err
	}
	answer, err := c.next()
	if err == nil && !strings.HasSuffix(answer, " "+line) {
		err = fmt.Errorf("%q was answered by %q", line, answer)
	}
	return answer, err
}

// leave ends the connection as a client should, and expects the same of the server.
func (c *client) leave() error {
	defer c.Close()
	if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	line, err := c.next()
	if err == nil {
		return fmt.Errorf("got %q at the end", line)
	}
	if err != io.EOF {
		return err
	}
	return nil
}

// passing connects for every line.
func passing(s *exampletest.Service) exampletest.ClientFunc {
	return func() (string, error) {
		c, err := dial(s)
		if err != nil {
			return "", err
		}
		defer c.Close()
		answer, err := c.ask("hello")
		if err != nil {
			return "", err
		}
		return answer, c.leave()
	}
}

// A staying client keeps its connection until the server asks it to leave, and
// then connects again.
type staying struct {
	s *exampletest.Service
	c *client
	n int
}

func (st *staying) Exchange() (string, error) {
	if st.c == nil {
		var err error
		if st.c, err = dial(st.s); err != nil {
			return "", err
		}
	}
	st.n++
	answer, err := st.c.ask(fmt.Sprint("line ", st.n))
	if err == nil && !st.c.closing {
		return answer, nil
	}
	return answer, errors.Join(err, st.Leave())
}

func (st *staying) Leave() error {
	if st.c == nil {
		return nil
	}
	c := st.c
	st.c = nil
	return c.leave()
}

func TestUpgradeUnderLoad(t *testing.T) {
	s := exampletest.Start(t)
	s.UpgradeUnderLoad(nil, passing(s), passing(s), passing(s))
}

func TestUpgradeUnderLoadOfLongConnections(t *testing.T) {
	s := exampletest.Start(t)
	s.UpgradeUnderLoad(nil, passing(s), &staying{s: s}, &staying{s: s}, &staying{s: s})
}

func TestSurviveFailures(t *testing.T) {
	s := exampletest.Start(t)
	s.SurviveFailures(passing(s), &staying{s: s}, &staying{s: s})
}

func connect(t *testing.T, s *exampletest.Service) *client {
	t.Helper()
	c, err := dial(s)
	proctest.OK(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func (c *client) mustAsk(t *testing.T, line string, pid int, version string) {
	t.Helper()
	got, err := c.ask(line)
	if want := fmt.Sprintf("version=%s pid=%d %s", version, pid, line); got != want || err != nil {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

// awaitClosing waits to be asked to leave.
func (c *client) awaitClosing(t *testing.T) {
	t.Helper()
	if !c.lines.Scan() || c.lines.Text() != "closing" {
		t.Fatalf(`got %q, %v, want "closing"`, c.lines.Text(), c.lines.Err())
	}
	c.closing = true
}

func TestConnectionOutlivesUpgrade(t *testing.T) {
	s := exampletest.Start(t)
	before := connect(t, s)
	before.mustAsk(t, "one", s.PID(), "v1")
	s.Install("v2")
	old, inCharge := s.Upgrade()
	before.awaitClosing(t)

	var after *client
	proctest.AwaitThat(t, "the new process has a client", func() bool {
		after = connect(t, s)
		answer, err := after.ask("hello")
		proctest.OK(t, err)
		if strings.HasPrefix(answer, "version=v2 ") {
			return true
		}
		proctest.OK(t, after.leave()) // the old one had not closed its listener yet
		return false
	})
	after.mustAsk(t, "two", inCharge, "v2")
	before.mustAsk(t, "three", old, "v1")
	if _, err := io.WriteString(before, "four\nfive\n"); err != nil {
		t.Fatal(err)
	}
	proctest.OK(t, before.Conn.(*net.TCPConn).CloseWrite())
	for _, line := range []string{"four", "five"} {
		if got, err := before.next(); !strings.HasSuffix(got, line) || err != nil {
			t.Errorf("got %q, %v, want the answer to %q", got, err, line)
		}
	}
	if got, err := before.next(); err != io.EOF {
		t.Errorf("got %q, %v at the end", got, err)
	}
	s.AwaitEnd(old, 0)
	s.Await(old, "drained")
	after.mustAsk(t, "six", inCharge, "v2")
	if after.closing {
		t.Error("a client of the new process was told to leave")
	}
	if err := after.leave(); err != nil {
		t.Error(err)
	}
	s.Stop()
}

func TestReplacedIsInterrupted(t *testing.T) {
	s := exampletest.Start(t)
	connect(t, s).mustAsk(t, "one", s.PID(), "v1")
	old, _ := s.Upgrade()
	s.Await(old, "draining")
	s.Interrupt(old)
	s.Stop()
}

func TestDrainDeadline(t *testing.T) {
	s := exampletest.Start(t, "-drain", "50ms")
	c := connect(t, s)
	pid := s.PID()
	c.mustAsk(t, "one", pid, "v1")
	s.Signal(pid, syscall.SIGTERM)
	c.awaitClosing(t)
	if got, err := c.next(); err != io.EOF {
		t.Errorf("got %q, %v, want to be cut off", got, err)
	}
	s.AwaitEnd(pid, 1)
	if failure := s.Await(pid, "exiting")["error"]; !strings.Contains(failure, "has not ended") {
		t.Errorf("the process ended with %q", failure)
	}
}
