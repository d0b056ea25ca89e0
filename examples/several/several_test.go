//go:build unix

package main

import (
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

// start returns the service, and its clients.
func start(t *testing.T, flags ...string) (*exampletest.Service, []exampletest.Client) {
	t.Helper()
	s := exampletest.Start(t, flags...)
	lines, datagrams := s.Await(s.PID(), "listening")["addr"], s.Await(s.PID(), "listening")["addr"]
	return s, []exampletest.Client{
		exampletest.ClientFunc(func() (string, error) { return get("http://" + s.Addr()) }),
		exampletest.ClientFunc(func() (string, error) { return get("http://" + s.Addr()) }),
		asking("tcp", lines), asking("tcp", lines),
		asking("udp", datagrams), asking("udp", datagrams),
	}
}

var client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

func get(url string) (string, error) {
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %s", response.Status)
	}
	return string(answer), err
}

// asking sends a line on a socket of its own.
func asking(network, addr string) exampletest.ClientFunc {
	return func() (string, error) {
		conn, err := net.Dial(network, addr)
		if err != nil {
			return "", err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(proctest.Patience))
		if _, err := fmt.Fprintln(conn, "hello"); err != nil {
			return "", err
		}
		answer := make([]byte, 100)
		n, err := conn.Read(answer)
		if err == nil && !strings.Contains(string(answer[:n]), "hello") {
			err = fmt.Errorf("got the answer %q", answer[:n])
		}
		return string(answer[:n]), err
	}
}

func TestUpgradeUnderLoad(t *testing.T) {
	s, clients := start(t)
	s.UpgradeUnderLoad(nil, clients...)
}

func TestSurviveFailures(t *testing.T) {
	s, clients := start(t)
	s.SurviveFailures(clients...)
}

func TestJobChangesHands(t *testing.T) {
	s, _ := start(t)
	pid := s.PID()
	s.Await(pid, "job begins")
	old, inCharge := s.Upgrade()
	s.AwaitEnd(old, 0)
	s.Await(old, "job ends")
	s.Await(inCharge, "job begins")
	s.Stop()
	s.Await(inCharge, "job ends")
}

func TestHealthFailsBeforeTheDrain(t *testing.T) {
	s := exampletest.Start(t, "-delay", "1h")
	// A line that does not come, so that there is something to cut.
	conn := proctest.Must(net.Dial("tcp", s.Await(s.PID(), "listening")["addr"]))
	defer conn.Close()
	health := "http://" + s.Addr() + "/health"
	if answer, err := get(health); err != nil {
		t.Errorf("got %q, %v", answer, err)
	}
	pid := s.PID()
	s.Signal(pid, syscall.SIGTERM)
	proctest.AwaitThat(t, "it fails", func() bool {
		_, err := get(health)
		return err != nil && strings.Contains(err.Error(), "503")
	})
	if answer, err := get("http://" + s.Addr()); err != nil {
		t.Errorf("it does not serve during the delay: got %q, %v", answer, err)
	}
	s.Interrupt(pid)
}
