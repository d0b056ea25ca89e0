package httpdrain

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"
)

const inserted = goAway + ping + areYouLeaving

// sink is a connection that keeps what is written to it. It may write in parts.
type sink struct {
	net.Conn
	written bytes.Buffer
	short   func(n int) int
	failed  bool
}

func (s *sink) Write(p []byte) (int, error) {
	n := len(p)
	if string(p) != inserted {
		n = s.short(n)
	}
	s.written.Write(p[:n])
	if n < len(p) {
		s.failed = true
		return n, net.ErrClosed // as with a deadline, after which the server goes on
	}
	return n, nil
}

// Wherever the server's writes are split, what is inserted comes between two
// frames, outside of header blocks, and as soon as it may.
func FuzzInsert(f *testing.F) {
	f.Add(uint64(0), []byte{})
	f.Add(uint64(0), []byte{0, 1, 8, 9, 200})
	for seed := range uint64(100) {
		f.Add(seed, bytes.Repeat([]byte{0, 3, 5}, 10))
	}
	f.Fuzz(func(t *testing.T, seed uint64, sizes []byte) {
		sizes = sizes[:min(len(sizes), 32)] // so that no input takes seconds
		random := rand.New(rand.NewPCG(seed, 0))
		stream, ends := randomFrames(random, sizes)
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
			if c.greeted && want < 0 && random.IntN(2) == 0 {
				want = ends[slices.IndexFunc(ends, func(end int) bool { return end >= at })]
				c.insert(inserted)
			}
			nc.failed = false
			n, err := c.Write(stream[at : at+1+random.IntN(len(stream)-at)])
			if (err != nil) != nc.failed {
				t.Fatalf("error %v; the connection has failed: %t", err, nc.failed)
			}
			at += n
		}
		if got := bytes.Index(nc.written.Bytes(), []byte(inserted)); got != want {
			t.Fatalf("inserted at %d, want %d", got, want)
		}
		if got := bytes.Replace(nc.written.Bytes(), []byte(inserted), nil, 1); !bytes.Equal(got, stream) {
			t.Errorf("the server's own bytes have changed")
		}
	})
}

// randomFrames returns frames with payloads of about the sizes squared, and where
// others may come between them. Some have a header block in several frames.
func randomFrames(random *rand.Rand, sizes []byte) (stream []byte, ends []int) {
	const data = 0
	kinds := []byte{data, typeHeaders, 3, 4, typePushPromise, 6, 8}
	add := func(kind, flags byte, n int) {
		stream = append(stream, byte(n>>16), byte(n>>8), byte(n), kind, flags, 0, 0, 0, 1)
		for range n {
			stream = append(stream, byte(random.Uint32()))
		}
	}
	add(4, 0, 0) // SETTINGS
	ends = append(ends, len(stream))
	for _, size := range sizes {
		n := int(size) * int(size)
		switch kind := kinds[random.IntN(len(kinds))]; kind {
		case typeHeaders, typePushPromise:
			more := random.IntN(3)
			for ; more > 0; more-- {
				add(kind, byte(random.Uint32())&^flagEndHeaders, n)
				kind = typeContinuation
			}
			add(kind, byte(random.Uint32())|flagEndHeaders, n)
		default:
			add(kind, byte(random.Uint32()), n)
		}
		ends = append(ends, len(stream))
	}
	return stream, ends
}

// Only the first acknowledgement counts, and none that comes before the farewell.
func TestAcknowledgement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(new(http.Server)).framed(&sink{short: func(n int) int { return n }})
		c.http2.Store(true)
		c.preface = len(preface)
		want := func(told time.Time, knows bool) {
			t.Helper()
			if c.told != told || c.knows != knows {
				t.Errorf("told at %v, knows %t; want %v, %t", c.told, c.knows, told, knows)
			}
			time.Sleep(time.Second) // in the bubble's time
		}
		c.follow([]byte(pingAck + areYouLeaving))
		want(time.Time{}, false)
		c.insert(goAway + ping + areYouLeaving)
		want(time.Now(), false)
		c.follow([]byte(pingAck + areYouLeaving))
		known := time.Now()
		want(known, true)
		c.follow([]byte(pingAck + areYouLeaving))
		want(known, true)
	})
}

// pieces is a connection that receives one of them at a time.
type pieces struct {
	*sink
	left []string
}

func (c *pieces) Read(p []byte) (int, error) {
	n := copy(p, c.left[0])
	c.left = c.left[1:]
	return n, nil
}

// What does not begin with the preface is not HTTP/2, and what is written to it no frame.
func TestNotHTTP2(t *testing.T) {
	for _, received := range [][]string{
		{"GET / HTTP/1.1\r\n", preface},
		{"P", "OST / HTTP/1.1\r\n", preface[1:]},
		{preface[:3] + "X", preface, preface[3:]},
	} {
		c := New(new(http.Server)).framed(&pieces{sink: &sink{short: func(n int) int { return n }}, left: received})
		for range received {
			c.Read(make([]byte, 100))
		}
		c.Write(make([]byte, headerLen))
		if c.http2.Load() || c.greeted {
			t.Errorf("taken for HTTP/2 after %q: %t, and a frame seen: %t", received, c.http2.Load(), c.greeted)
		}
		if err := c.CloseWrite(); err != nil { // which the connection has not
			t.Error(err)
		}
	}
}

// What is copied to a connection is seen, too.
func TestReadFrom(t *testing.T) {
	c := New(new(http.Server)).framed(&sink{short: func(n int) int { return n }})
	c.http2.Store(true)
	n, err := plainConn{c}.ReadFrom(strings.NewReader(ping + areYouLeaving))
	if n != int64(len(ping+areYouLeaving)) || err != nil || !c.greeted {
		t.Errorf("copied %d bytes, %v; the frame was seen: %t", n, err, c.greeted)
	}
}

// depthConn notes how deep the stack is when it is written to.
type depthConn struct {
	net.Conn
	depth uintptr
}

//go:noinline
func (c *depthConn) Write(p []byte) (int, error) {
	var here byte
	c.depth = uintptr(unsafe.Pointer(&here))
	return len(p), nil
}

// The server writes each response in a new goroutine, whose stack net/http fills nearly to
// the end. To be copied to a larger one would cost some percent of a request.
func TestWriteIsShallow(t *testing.T) {
	nc := new(depthConn)
	c := New(new(http.Server)).framed(nc)
	c.http2.Store(true)
	frame := make([]byte, headerLen)
	var depths [2]uintptr
	for i, w := range []io.Writer{nc, plainConn{c}} {
		w.Write(frame)
		depths[i] = nc.depth
	}
	if deeper := depths[0] - depths[1]; deeper > 176 {
		t.Errorf("a write takes %d bytes of stack more", deeper)
	}
}
