//go:build unix

package main

import (
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/exampletest"
	"example.com/tableflip/internal/proctest"
	"github.com/miekg/dns"
)

func TestMain(m *testing.M) { exampletest.Main(m) }

// start starts the service, and returns where it answers over TCP.
func start(t *testing.T, flags ...string) (s *exampletest.Service, tcp string) {
	t.Helper()
	s = exampletest.Start(t, flags...)
	return s, s.Await(s.PID(), "listening")["addr"]
}

// A client asks over one connection, until it is told to leave. It never asks twice.
type client struct {
	network, addr string
	stays         bool // as long as it may; otherwise it connects for every query

	conn *dns.Conn
	n    int
}

func (c *client) Exchange() (string, error) {
	if c.conn == nil {
		conn, err := net.Dial(c.network, c.addr)
		if err != nil {
			return "", err
		}
		c.conn = &dns.Conn{Conn: conn}
	}
	c.n++
	answer, leave, err := c.ask(fmt.Sprintf("query%d.example.", c.n))
	if leave || !c.stays || err != nil {
		c.Leave()
	}
	return answer, err
}

// ask returns whether the server wants the client to leave.
func (c *client) ask(name string) (answer string, leave bool, err error) {
	query := new(dns.Msg).SetQuestion(name, dns.TypeTXT)
	if c.stays {
		query.SetEdns0(dns.DefaultMsgSize, false)
		query.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_TCP_KEEPALIVE{Code: dns.EDNS0TCPKEEPALIVE}}
	}
	c.conn.SetDeadline(time.Now().Add(proctest.Patience))
	if err := c.conn.WriteMsg(query); err != nil {
		return "", false, err
	}
	msg, err := c.conn.ReadMsg()
	if err != nil {
		return "", false, err
	}
	if msg.Id != query.Id || len(msg.Answer) != 1 {
		return "", false, fmt.Errorf("%s was answered by %v", name, msg)
	}
	answer = msg.Answer[0].(*dns.TXT).Txt[0]
	if !strings.HasSuffix(answer, " "+name) {
		return "", false, fmt.Errorf("%s was answered by %q", name, answer)
	}
	if c.stays {
		leave = msg.IsEdns0().Option[0].(*dns.EDNS0_TCP_KEEPALIVE).Timeout == 0
	}
	return answer, leave, nil
}

func (c *client) Leave() error {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
	return nil
}

func clients(s *exampletest.Service, tcp string) []exampletest.Client {
	return []exampletest.Client{
		&client{network: "udp", addr: s.Addr()}, &client{network: "udp", addr: s.Addr()},
		&client{network: "tcp", addr: tcp}, &client{network: "tcp", addr: tcp}, &client{network: "tcp", addr: tcp},
		&client{network: "tcp", addr: tcp, stays: true}, &client{network: "tcp", addr: tcp, stays: true},
	}
}

func TestUpgradeUnderLoad(t *testing.T) {
	s, tcp := start(t)
	s.UpgradeUnderLoad(nil, clients(s, tcp)...)
}

func TestSurviveFailures(t *testing.T) {
	s, tcp := start(t)
	s.SurviveFailures(clients(s, tcp)...)
}

// What Shutdown would lose: a connection from which nothing has come yet, and one that is
// idle.
func TestConnectionsOutliveUpgrade(t *testing.T) {
	s, tcp := start(t)
	idle, young := &client{network: "tcp", addr: tcp, stays: true}, &client{network: "tcp", addr: tcp, stays: true}
	_, err := idle.Exchange()
	proctest.OK(t, err)
	young.conn = &dns.Conn{Conn: proctest.Must(net.Dial("tcp", tcp))}
	// The server accepts in the order in which they connect.
	_, err = (&client{network: "tcp", addr: tcp}).Exchange()
	proctest.OK(t, err)
	s.Install("v2")
	old, _ := s.Upgrade()
	for name, c := range map[string]*client{"idle": idle, "young": young} {
		answer, leave, err := c.ask("late.example.")
		if want := fmt.Sprintf("version=v1 pid=%d late.example.", old); answer != want || !leave || err != nil {
			t.Errorf("the %s connection got %q, told to leave: %t, %v, want %q", name, answer, leave, err, want)
		}
		c.Leave()
	}
	s.AwaitEnd(old, 0)
	s.Await(old, "drained")
	s.Stop()
}

// A client that never pauses and cannot be told to leave is cut.
func TestDrainDeadline(t *testing.T) {
	s, tcp := start(t, "-drain", "50ms")
	c := &client{network: "tcp", addr: tcp, stays: true}
	_, err := c.Exchange()
	proctest.OK(t, err)
	pid := s.PID()
	s.Signal(pid, syscall.SIGTERM)
	s.AwaitEnd(pid, 1)
	if failure := s.Await(pid, "exiting")["error"]; !strings.Contains(failure, "has not ended") {
		t.Errorf("the process ended with %q", failure)
	}
}
