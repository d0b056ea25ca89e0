//go:build unix

package control

import (
	"encoding/json"
	"io"
	"os"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/link"
	"example.com/tableflip/internal/proctest"
)

// What one process hears of older ones, and tells those that came after it, which only
// the test plays.

// These files of a registry are passed on from generation to generation.
type files map[string]*os.File

func (f files) File(name string) (*os.File, error) {
	file := f[name]
	if file == nil {
		return nil, nil
	}
	fd, err := descriptor.DuplicateOf(file)
	return os.NewFile(fd, name), err
}

func (f files) AddFile(name string, file *os.File) error {
	fd, err := descriptor.DuplicateOf(file)
	if err != nil {
		return err
	}
	f[name].Close() // none is an error that does not matter
	f[name] = os.NewFile(fd, name)
	return nil
}

func (f files) RemoveFile(name string) error {
	err := f[name].Close()
	delete(f, name)
	return err
}

func (f files) close() {
	for _, file := range f {
		file.Close()
	}
}

// A replaceable Upgrader is replaced when the test wants that.
type replaceable struct {
	memoryUpgrader
	files
	exit  chan struct{}
	stops bool
	hold  sync.Mutex // holds the Server up that asks for Generations
}

func (u *replaceable) File(name string) (*os.File, error) { return u.files.File(name) }
func (u *replaceable) AddFile(name string, file *os.File) error {
	return u.files.AddFile(name, file)
}
func (u *replaceable) RemoveFile(name string) error { return u.files.RemoveFile(name) }
func (u *replaceable) Exit() <-chan struct{}        { return u.exit }
func (u *replaceable) Replaced() bool               { return proctest.IsClosed(u.exit) && !u.stops }

func (u *replaceable) Generations() []tableflip.Generation {
	u.hold.Lock()
	defer u.hold.Unlock()
	return []tableflip.Generation{{PID: os.Getpid(), Number: 2}}
}

// A chain is a generation that serves, and one before it.
type chain struct {
	*Server
	upg   *replaceable
	older *link.Link // from that one
}

func newChain(t *testing.T, opts Options) *chain {
	t.Helper()
	upg := &replaceable{memoryUpgrader: newMemoryUpgrader(), files: files{}, exit: make(chan struct{})}
	t.Cleanup(upg.close)
	older := proctest.Opened[*link.Meeting](t)(link.Join(upg, meeting))
	s := proctest.Must(New(upg, "", opts))
	t.Cleanup(s.Close)
	go s.Serve()
	return &chain{s, upg, proctest.Opened[*link.Link](t)(older.Accept(t.Context()))}
}

// A successor is a process that came after that of a chain.
type successor struct {
	*link.Meeting
	t *testing.T
}

// join returns a process that comes next, once it is known.
func (c *chain) join(t *testing.T) successor {
	t.Helper()
	before, own := c.successors(), files{}
	for name, file := range c.upg.files {
		proctest.OK(t, own.AddFile(name, file))
	}
	t.Cleanup(own.close)
	m := proctest.Opened[*link.Meeting](t)(link.Join(own, meeting))
	proctest.AwaitThat(t, "the process is known", func() bool { return c.successors() > before })
	return successor{m, t}
}

func (c *chain) successors() int {
	c.relay.mu.Lock()
	defer c.relay.mu.Unlock()
	return len(c.relay.newer)
}

func (s successor) want(want report) {
	s.t.Helper()
	var got report
	message, _, err := s.Older()[0].Receive(s.t.Context())
	proctest.OK(s.t, err)
	proctest.OK(s.t, json.Unmarshal(message, &got))
	if !reflect.DeepEqual(got, want) {
		s.t.Errorf("got %s, want %s", message, encode(want))
	}
}

// hears sends a report of the older process.
func (c *chain) hears(t *testing.T, message string) {
	t.Helper()
	proctest.OK(t, c.older.Send(t.Context(), []byte(message)))
}

// Older processes may say more, in a later version.
func TestReportsHeard(t *testing.T) {
	proctest.WithoutGC(t)
	c := newChain(t, Options{})
	read, write, err := os.Pipe()
	proctest.OK(t, err)
	defer read.Close()
	proctest.OK(t, c.older.Send(t.Context(), []byte(`{"cut":7,"pid":"new"}`), write))
	write.Close()
	read.SetReadDeadline(time.Now().Add(proctest.Patience))
	_, err = read.Read(make([]byte, 1))
	proctest.WantError(t, "what was sent with a report is still open", err, io.EOF)

	c.hears(t, `{"pid":4000001,"connections":5,"cut":2,"new":1,"counters":{"upgrades":9,"failures":{"child":1},"drains":1,"drainSeconds":1.5,"connectionsCut":1}}`)
	proctest.AwaitThat(t, "it was heard", func() bool { return c.Counters().Drains == 1 })
	wantCounters(t, c.Counters(), Counters{1, map[string]int{"child": 1}, 1, 1.5, 3})
	if n := c.connectionsOf(4000001); n == nil || *n != 5 {
		t.Error("how many connections the process has is not known")
	}
	if n := c.connectionsOf(4000002); n != nil {
		t.Errorf("a process that has reported nothing has %d connections", *n)
	}
}

// What is known when a process is replaced, and what it hears later, its successor hears
// once.
func TestReportsPassedOn(t *testing.T) {
	connections, left, two := 5, 3, 2
	c := newChain(t, Options{Connections: func() int { return left }, Cut: func() int { return two }})
	c.join(t).Close()
	proctest.AwaitThat(t, "the process that has failed is forgotten", func() bool { return c.successors() == 0 })
	next, last := c.join(t), c.join(t)
	c.hears(t, `{"pid":4000001,"connections":5,"cut":2}`)
	proctest.AwaitThat(t, "it was heard", func() bool { return c.Counters().ConnectionsCut == 2 })

	c.upg.hold.Lock()
	close(c.upg.exit)
	proctest.Within(t, "the end of the socket", c.upg.ln.closed)
	c.heed(report{PID: 4000001, Cut: 1})
	c.upg.hold.Unlock()
	self := os.Getpid()
	next.want(report{PID: self, Counters: &Counters{1, map[string]int{}, 0, 0, 3}})
	next.want(report{PID: 4000001, Connections: &connections})
	next.want(report{PID: self, Connections: &left})
	c.hears(t, `{"pid":4000001,"cut":4}`)
	next.want(report{PID: 4000001, Cut: 4})

	next.Close()
	c.hears(t, `{"pid":4000001,"cut":5}`)
	last.want(report{PID: 4000001, Cut: 5})
	c.Close()
	last.want(report{PID: self, Cut: two})
	for _, l := range []*link.Link{last.Older()[0], c.older} {
		_, _, err := l.Receive(t.Context())
		proctest.WantError(t, "after Close", err, io.EOF)
	}
}

// How the drain has ended is told when it has, to who comes late, too.
func TestReportsWait(t *testing.T) {
	var cut atomic.Int32
	closed := make(chan struct{})
	c := newChain(t, Options{Cut: func() int {
		n := int(cut.Load())
		select {
		case <-closed: // too early
		case <-time.After(50 * time.Millisecond): // Nothing shows that Close waits.
		}
		return n
	}})
	close(c.upg.exit)
	proctest.AwaitThat(t, "there is something to tell", func() bool {
		c.relay.mu.Lock()
		defer c.relay.mu.Unlock()
		return c.relay.passesOn
	})
	next := c.join(t)
	next.want(report{PID: os.Getpid(), Counters: &Counters{1, map[string]int{}, 0, 0, 0}})
	cut.Store(2)
	c.Close()
	close(closed)
	next.want(report{PID: os.Getpid(), Cut: 2})
}

// A process that stops goes on to count.
func TestReportsOfStopping(t *testing.T) {
	events, cancel := event.Subscribe()
	defer cancel()
	c := newChain(t, Options{Connections: func() int { return 3 }})
	c.upg.stops = true
	close(c.upg.exit)
	proctest.Within(t, "the beginning of the drain", events)
	c.hears(t, `{"pid":4000001,"cut":2}`)
	proctest.AwaitThat(t, "it was heard", func() bool { return c.Counters().ConnectionsCut == 2 })
}

// A process that has just ended is not told, but the one that came after it.
func TestReportsNotToTheDead(t *testing.T) {
	c := newChain(t, Options{})
	r := files{}
	t.Cleanup(r.close)
	other := proctest.Opened[*link.Meeting](t)(link.Join(r, meeting))
	proctest.OK(t, proctest.Opened[*link.Meeting](t)(link.Join(r, meeting)).Close())
	c.relay.add(proctest.Must(other.Accept(t.Context()))) // which nobody but report forgets
	next := c.join(t)
	close(c.upg.exit)
	next.want(report{PID: os.Getpid(), Counters: &Counters{1, map[string]int{}, 0, 0, 0}})
}

// Nobody hears the reports, and Close returns.
func TestReportsToNobody(t *testing.T) {
	t.Cleanup(SetPatience(time.Millisecond))
	c := newChain(t, Options{Cut: func() int { return 2 }})
	close(c.upg.exit)
	proctest.Within(t, "the end of the socket", c.upg.ln.closed)
	proctest.Within(t, "Close", proctest.InBackground(func() bool { c.Close(); return true }))
}

// A process that does not read misses reports, and gets those that come when it does.
func TestReportsToTheStuck(t *testing.T) {
	t.Cleanup(SetPatience(time.Millisecond))
	c := newChain(t, Options{})
	next := c.join(t)
	close(c.upg.exit)
	for range 1000 { // more than a socket holds
		c.report(report{Cut: 1})
	}
	received := proctest.InBackground(func() error {
		for {
			message, _, err := next.Older()[0].Receive(t.Context())
			if err != nil || string(message) == string(encode(report{Cut: 2})) {
				return err
			}
		}
	})
	for len(received) == 0 {
		c.report(report{Cut: 2})
	}
	proctest.OK(t, <-received)
}
