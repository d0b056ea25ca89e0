//go:build unix

package benchmarks

import (
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// patience bounds every wait for a peer. Nothing passes because of it.
const patience = 30 * time.Second

// BenchmarkServe measures what it costs a server that an upgrade has brought about
// to accept TCP connections, and to answer datagrams, on sockets that it inherited.
// The floor here has no upgrader and no parent: it is a process with net.Listen.
//
// Every iteration has the same requests answered by one process of each contender,
// in random order, by two clients at once. The time from begin to end includes
// the clients'; cpu- is the server's CPU time alone.
func BenchmarkServe(b *testing.B) {
	b.Run("accept", func(b *testing.B) {
		serve(b, func(c *chain) error { return connect(c.serving.tcp) })
	})
	b.Run("datagram", func(b *testing.B) {
		serve(b, func(c *chain) error { return exchange(c.serving.udp, requestsPerClient) })
	})
}

const (
	clients           = 2
	requestsPerClient = 200
)

func serve(b *testing.B, client func(*chain) error) {
	chains := make([]*chain, len(contenders))
	for i, c := range contenders {
		chains[i] = startChain(b, c, 1)
		if c != contenderFloor {
			chains[i].upgrade()
		}
	}
	took := make([][]time.Duration, len(contenders))
	used := make([][]time.Duration, len(contenders))
	for b.Loop() {
		for _, i := range rand.Perm(len(contenders)) {
			usedBefore := chains[i].cpu()
			begin := time.Now()
			var group sync.WaitGroup
			for range clients {
				group.Go(func() {
					if err := client(chains[i]); err != nil {
						b.Error(err)
					}
				})
			}
			group.Wait()
			const requests = clients * requestsPerClient
			took[i] = append(took[i], time.Since(begin)/requests)
			used[i] = append(used[i], (chains[i].cpu()-usedBefore)/requests)
		}
	}
	report(b, "", "µs", time.Microsecond, took)
	report(b, "cpu-", "µs", time.Microsecond, used)
}

// connect opens connections one after another, and waits for the greeting on each.
func connect(addr string) error {
	for range requestsPerClient {
		if err := greeted(addr); err != nil {
			return err
		}
	}
	return nil
}

func greeted(addr string) error {
	conn, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	// The port is free again at once: there are fewer ports than connections.
	conn.(*net.TCPConn).SetLinger(0)
	conn.SetDeadline(time.Now().Add(patience))
	_, err = io.ReadFull(conn, make([]byte, 1))
	return err
}

// exchange sends n datagrams, each after the answer to the one before.
func exchange(addr string, n int) error {
	conn, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	datagram := make([]byte, 16)
	for range n {
		if _, err := conn.Write(datagram); err != nil {
			return err
		}
		if _, err := conn.Read(datagram); err != nil {
			return err
		}
	}
	return nil
}
