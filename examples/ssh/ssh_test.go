//go:build unix

package main

import (
	"bufio"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/exampletest"
	"example.com/tableflip/internal/proctest"
	"golang.org/x/crypto/ssh"
)

func TestMain(m *testing.M) { exampletest.Main(m) }

func start(t *testing.T, flags ...string) *exampletest.Service {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	proctest.OK(t, err)
	block := proctest.Must(ssh.MarshalPrivateKey(key, ""))
	file := filepath.Join(t.TempDir(), "host")
	proctest.OK(t, os.WriteFile(file, pem.EncodeToMemory(block), 0o600))
	return exampletest.Start(t, append(flags, "-host-key", file)...)
}

func handshake(conn net.Conn) (*ssh.Client, error) {
	conn.SetDeadline(time.Now().Add(proctest.Patience))
	sshConn, channels, requests, err := ssh.NewClientConn(conn, "example", &ssh.ClientConfig{
		User: "user", HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		return nil, err
	}
	return ssh.NewClient(sshConn, channels, requests), nil
}

func dial(s *exampletest.Service) (*ssh.Client, error) {
	conn, err := net.Dial("tcp", s.Addr())
	if err != nil {
		return nil, err
	}
	return handshake(conn)
}

// execute runs one command. If its session was refused, it has not begun.
func execute(client *ssh.Client, line string) (answer string, refused bool, err error) {
	session, err := client.NewSession()
	if err != nil {
		var failure *ssh.OpenChannelError
		return "", errors.As(err, &failure) && failure.Reason == ssh.ResourceShortage, err
	}
	defer session.Close()
	session.Stdin = strings.NewReader("input")
	output, err := session.Output(line)
	if answer = string(output); err == nil && !strings.HasSuffix(answer, " "+line+"\ninput") {
		err = fmt.Errorf("%q was answered by %q", line, answer)
	}
	return answer, false, err
}

// A client runs commands, on one connection until a session is refused.
type client struct {
	s     *exampletest.Service
	stays bool

	*ssh.Client
	n int
}

func (c *client) Exchange() (string, error) {
	c.n++
	for {
		if c.Client == nil {
			var err error
			if c.Client, err = dial(c.s); err != nil {
				return "", err
			}
		}
		answer, refused, err := execute(c.Client, fmt.Sprint("command ", c.n))
		if refused || err != nil || !c.stays {
			c.Leave()
		}
		if !refused {
			return answer, err
		}
	}
}

func (c *client) Leave() error {
	if c.Client != nil {
		c.Client.Close()
		c.Client = nil
	}
	return nil
}

func clients(s *exampletest.Service) []exampletest.Client {
	return []exampletest.Client{&client{s: s}, &client{s: s}, &client{s: s, stays: true}, &client{s: s, stays: true}}
}

func TestUpgradeUnderLoad(t *testing.T) {
	s := start(t)
	s.UpgradeUnderLoad(nil, clients(s)...)
}

func TestSurviveFailures(t *testing.T) {
	s := start(t)
	s.SurviveFailures(clients(s)...)
}

// A session is one that the server has begun, and cannot have ended.
type session struct {
	t      *testing.T
	input  io.WriteCloser
	output *bufio.Reader
}

func begin(t *testing.T, client *ssh.Client) *session {
	t.Helper()
	opened, err := client.NewSession()
	proctest.OK(t, err)
	input, err := opened.StdinPipe()
	proctest.OK(t, err)
	output, err := opened.StdoutPipe()
	proctest.OK(t, err)
	proctest.OK(t, opened.Start("long"))
	s := &session{t, input, bufio.NewReader(output)}
	s.want("long")
	return s
}

func (s *session) want(suffix string) {
	s.t.Helper()
	if line, err := s.output.ReadString('\n'); !strings.HasSuffix(line, suffix+"\n") || err != nil {
		s.t.Fatalf("got %q, %v, want %q", line, err, suffix)
	}
}

func TestSessionOutlivesUpgrade(t *testing.T) {
	s := start(t)
	conn := proctest.Must(dial(s))
	defer conn.Close()
	long := begin(t, conn)
	// One that has said nothing yet.
	young := proctest.Must(net.Dial("tcp", s.Addr()))
	defer young.Close()
	_, err := (&client{s: s}).Exchange() // The server accepts in the order of connecting.
	proctest.OK(t, err)

	s.Install("v2")
	old, _ := s.Upgrade()
	s.Await(old, "draining")
	first, err := handshake(young)
	proctest.OK(t, err)
	if answer, _, err := execute(first, "late"); !strings.HasPrefix(answer, "version=v1 ") || err != nil {
		t.Errorf("got %q, %v from the old process", answer, err)
	}
	proctest.AwaitThat(t, "further sessions are refused", func() bool {
		_, refused, _ := execute(conn, "another")
		return refused
	})
	fmt.Fprintln(long.input, "still")
	long.want("still")
	long.input.Close()
	s.AwaitEnd(old, 0)
	s.Await(old, "drained")
	s.Stop()
}

func TestDrainDeadline(t *testing.T) {
	s := start(t, "-drain", "50ms")
	conn := proctest.Must(dial(s))
	defer conn.Close()
	begin(t, conn)
	pid := s.PID()
	s.Signal(pid, syscall.SIGTERM)
	s.AwaitEnd(pid, 1)
	if failure := s.Await(pid, "exiting")["error"]; !strings.Contains(failure, "has not ended") {
		t.Errorf("the process ended with %q", failure)
	}
}
