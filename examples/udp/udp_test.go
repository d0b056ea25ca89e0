//go:build unix

package main

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"example.com/tableflip/internal/exampletest"
	"example.com/tableflip/internal/proctest"
)

func TestMain(m *testing.M) { exampletest.Main(m) }

// asking sends one datagram from a socket of its own and waits for the answer.
func asking(s *exampletest.Service) exampletest.ClientFunc {
	n := 0
	return func() (string, error) {
		conn, err := net.Dial("udp", s.Addr())
		if err != nil {
			return "", err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(proctest.Patience))
		n++
		question := fmt.Sprint("question ", n)
		if _, err := conn.Write([]byte(question)); err != nil {
			return "", err
		}
		answer := make([]byte, 1<<10)
		length, err := conn.Read(answer)
		if err == nil && !strings.HasSuffix(string(answer[:length]), " "+question) {
			err = fmt.Errorf("%q was answered by %q", question, answer[:length])
		}
		return string(answer[:length]), err
	}
}

func TestUpgradeUnderLoad(t *testing.T) {
	s := exampletest.Start(t)
	s.UpgradeUnderLoad(nil, asking(s), asking(s), asking(s), asking(s))
}

func TestSurviveFailures(t *testing.T) {
	s := exampletest.Start(t)
	s.SurviveFailures(asking(s), asking(s), asking(s), asking(s))
}

// Here the queue is hardly ever empty, so that both processes read from it during
// the handover. Every datagram must be answered, and no more than once.
func TestUpgradeUnderStream(t *testing.T) {
	s := exampletest.Start(t)
	stream := startStream(t, s)
	stream.await(t, s.PID())
	for _, version := range []string{"v2", "v1", "v2", "v1"} {
		s.Install(version)
		old, inCharge := s.Upgrade()
		s.AwaitEnd(old, 0)
		s.Await(old, "drained")
		stream.await(t, inCharge)
	}
	stream.stop()
	s.Stop()
}

// A stream is one client that does not wait for one answer to ask again.
type stream struct {
	conn     net.Conn
	answered chan int // the PIDs in the answers, as far as somebody waits for them
	stopping chan struct{}
	ended    chan struct{} // closed once all that was sent is answered, or after an error
}

// underWay is how many datagrams without an answer a stream keeps: so many have
// room in the queue, in which each takes less than 1 KiB of some 200.
const underWay = 64

func startStream(t *testing.T, s *exampletest.Service) *stream {
	t.Helper()
	conn, err := net.Dial("udp", s.Addr())
	proctest.OK(t, err)
	st := &stream{conn, make(chan int), make(chan struct{}), make(chan struct{})}
	go func() {
		defer close(st.ended)
		if err := st.run(); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		<-st.ended
	})
	return st
}

func (st *stream) run() error {
	unanswered := map[int]bool{}
	answer := make([]byte, 1<<10)
	for sent, stopping := 0, false; !stopping || len(unanswered) > 0; {
		select {
		case <-st.stopping:
			stopping = true
		default:
		}
		for ; !stopping && len(unanswered) < underWay; sent++ {
			if _, err := fmt.Fprint(st.conn, sent); err != nil {
				return err
			}
			unanswered[sent] = true
		}
		st.conn.SetReadDeadline(time.Now().Add(proctest.Patience))
		length, err := st.conn.Read(answer)
		if err != nil {
			return fmt.Errorf("%d of %d datagrams without an answer: %w", len(unanswered), sent, err)
		}
		var version string
		var pid, number int
		if _, err := fmt.Sscanf(string(answer[:length]), "version=%s pid=%d %d", &version, &pid, &number); err != nil {
			return fmt.Errorf("got the answer %q: %w", answer[:length], err)
		}
		if !unanswered[number] {
			return fmt.Errorf("got a second answer to %d: %q", number, answer[:length])
		}
		delete(unanswered, number)
		select {
		case st.answered <- pid:
		default:
		}
	}
	return nil
}

// await waits for an answer of this process.
func (st *stream) await(t *testing.T, pid int) {
	t.Helper()
	timeout := time.After(proctest.Patience)
	for {
		select {
		case got := <-st.answered:
			if got == pid {
				return
			}
		case <-st.ended:
			t.Fatal("the stream has ended")
		case <-timeout:
			t.Fatalf("waited for an answer of process %d", pid)
		}
	}
}

// stop waits for the answers to all that was sent.
func (st *stream) stop() {
	close(st.stopping)
	<-st.ended
}
