//go:build linux

package handover

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// BenchmarkServe measures what it costs a server that an upgrade has brought about
// to accept TCP connections, and to answer datagrams, on sockets that it inherited.
// The floor here has no upgrader and no parent: it is a process with net.Listen.
//
// Every iteration has the same requests answered by one process of each contender,
// in random order, by two clients at once. The time from begin to end includes
// the clients'; cpu- is the server's CPU time alone.
func BenchmarkServe(b *testing.B) {
	b.Run("accept", func(b *testing.B) {
		serve(b, func(ch *Chain) error { return Connect(ch.Serving.TCP, requestsPerClient) })
	})
	b.Run("datagram", func(b *testing.B) {
		serve(b, func(ch *Chain) error { return exchange(ch.Serving.UDP, requestsPerClient) })
	})
}

const (
	clients           = 2
	requestsPerClient = 200
)

func serve(b *testing.B, client func(*Chain) error) {
	chains := make([]*Chain, len(Contenders))
	for i, c := range Contenders {
		chains[i] = start(b, c, 1)
		if c != Floor {
			upgrade(b, chains[i])
		}
	}
	took := make([][]time.Duration, len(Contenders))
	used := make([][]time.Duration, len(Contenders))
	for b.Loop() {
		for _, i := range rand.Perm(len(Contenders)) {
			usedBefore := cpu(b, chains[i])
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
			used[i] = append(used[i], (cpu(b, chains[i])-usedBefore)/requests)
		}
	}
	report(b, "", "µs", time.Microsecond, took)
	report(b, "cpu-", "µs", time.Microsecond, used)
}

func cpu(b *testing.B, ch *Chain) time.Duration {
	b.Helper()
	used, err := ch.CPU()
	if err != nil {
		b.Fatal(err)
	}
	return used
}
