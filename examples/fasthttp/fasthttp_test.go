//go:build unix

package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/exampletest"
	"example.com/tableflip/internal/proctest"
)

func TestMain(m *testing.M) { exampletest.Main(m) }

// A client sends each request once, on one connection until it is told to leave.
type client struct {
	s     *exampletest.Service
	stays bool

	conn net.Conn
	from *bufio.Reader
}

func (c *client) Exchange() (string, error) {
	if c.conn == nil {
		conn, err := net.Dial("tcp", c.s.Addr())
		if err != nil {
			return "", err
		}
		c.conn, c.from = conn, bufio.NewReader(conn)
	}
	answer, leave, err := c.post()
	if leave || err != nil || !c.stays {
		c.Leave()
	}
	return answer, err
}

// post returns whether the server wants the client to leave.
func (c *client) post() (answer string, leave bool, err error) {
	c.conn.SetDeadline(time.Now().Add(proctest.Patience))
	if _, err := io.WriteString(c.conn, "POST / HTTP/1.1\r\nHost: example\r\nContent-Length: 5\r\n\r\nhello"); err != nil {
		return "", false, err
	}
	response, err := http.ReadResponse(c.from, nil)
	if err != nil {
		return "", false, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %s", response.Status)
	}
	return string(body), response.Close, err
}

func (c *client) Leave() error {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
	return nil
}

func clients(s *exampletest.Service) []exampletest.Client {
	return []exampletest.Client{&client{s: s}, &client{s: s}, &client{s: s, stays: true}, &client{s: s, stays: true}}
}

func TestUpgradeUnderLoad(t *testing.T) {
	s := exampletest.Start(t)
	s.UpgradeUnderLoad(nil, clients(s)...)
}

func TestSurviveFailures(t *testing.T) {
	s := exampletest.Start(t)
	s.SurviveFailures(clients(s)...)
}

// Shutdown would close it.
func TestIdleConnectionOutlivesUpgrade(t *testing.T) {
	s := exampletest.Start(t)
	c := &client{s: s, stays: true}
	_, err := c.Exchange()
	proctest.OK(t, err)
	s.Install("v2")
	old, _ := s.Upgrade()
	s.Await(old, "draining")
	answer, leave, err := c.post()
	if want := fmt.Sprintf("version=v1 pid=%d\n", old); answer != want || !leave || err != nil {
		t.Errorf("got %q, told to leave: %t, %v, want %q", answer, leave, err, want)
	}
	s.AwaitEnd(old, 0)
	s.Await(old, "drained")
	s.Stop()
}

func TestDrainDeadline(t *testing.T) {
	s := exampletest.Start(t, "-drain", "50ms")
	c := &client{s: s, stays: true}
	_, err := c.Exchange()
	proctest.OK(t, err)
	pid := s.PID()
	s.Signal(pid, syscall.SIGTERM)
	s.AwaitEnd(pid, 1)
	if failure := s.Await(pid, "exiting")["error"]; !strings.Contains(failure, "has not ended") {
		t.Errorf("the process ended with %q", failure)
	}
}
