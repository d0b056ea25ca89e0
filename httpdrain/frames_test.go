package httpdrain

import (
	"bytes"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"testing"
)

// sink is a connection that keeps what is written to it. It may write in parts.
type sink struct {
	net.Conn
	written bytes.Buffer
	short   func(n int) int
}

func (s *sink) Write(p []byte) (int, error) {
	n := len(p)
	if string(p) != ping+areYouQuiet {
		n = s.short(n)
	}
	s.written.Write(p[:n])
	if n < len(p) {
		return n, net.ErrClosed // as with a deadline, after which the server goes on
	}
	return n, nil
}

// Wherever the server's writes are split, what is inserted comes between two
// frames, and as soon as one ends.
func FuzzInsert(f *testing.F) {
	f.Add(uint64(0), []byte{})
	f.Add(uint64(0), []byte{0, 1, 8, 9, 200})
	for seed := range uint64(30) {
		f.Add(seed, bytes.Repeat([]byte{0, 3, 5}, 10))
	}
	f.Fuzz(func(t *testing.T, seed uint64, sizes []byte) {
		random := rand.New(rand.NewPCG(seed, 0))
		stream := []byte("\x00\x00\x00\x04\x00\x00\x00\x00\x00") // SETTINGS
		ends := []int{len(stream)}
		for _, size := range sizes {
			n := int(size) * int(size)
			stream = append(stream, byte(n>>16), byte(n>>8), byte(n), byte(random.IntN(7)), 0, 0, 0, 0, 1)
			for range n {
				stream = append(stream, byte(random.Uint32()))
			}
			ends = append(ends, len(stream))
		}
		nc := &sink{short: func(n int) int {
			if random.IntN(4) == 0 {
				return random.IntN(n + 1)
			}
			return n
		}}
		c := New(new(http.Server)).framed(nc)
		c.http2.Store(true)
		want := -1 // the first end since
		for at := 0; at < len(stream); {
			if c.greeted && !c.begun && random.IntN(2) == 0 {
				c.begun = true
				want = ends[slices.IndexFunc(ends, func(end int) bool { return end >= at })]
				c.insert(ping + areYouQuiet)
			}
			n, _ := c.Write(stream[at : at+1+random.IntN(len(stream)-at)])
			at += n
		}
		inserted := []byte(ping + areYouQuiet)
		if got := bytes.Index(nc.written.Bytes(), inserted); got != want {
			t.Fatalf("inserted at %d, want %d", got, want)
		}
		if got := bytes.Replace(nc.written.Bytes(), inserted, nil, 1); !bytes.Equal(got, stream) {
			t.Errorf("the server's own bytes have changed")
		}
	})
}
