//go:build unix

package proctest

import (
	"encoding/json"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/step"
)

// wire is the Wire of this process.
var wire atomic.Pointer[Wire]

// A Wire is a process's end of its connection to its test.
type Wire struct {
	orders chan Order
	resume chan struct{}

	mu     sync.Mutex
	encode *json.Encoder
	pause  step.Step
}

// An Order is what the test sends to a process.
type Order struct {
	Do        string
	Arguments []string
}

// The orders that a Wire obeys itself.
const (
	resume           = "resume"
	limitDescriptors = "limit descriptors"
	countGoroutines  = "count goroutines"
)

// The events of hooks, which Await does not see.
const (
	died   = "died"
	paused = "paused"
)

// OpenWire connects this process to its test, which has to have put Service.Wire into
// its environment. From then on the test is told every step. The process ends when
// the test does.
func OpenWire() *Wire {
	conn := Must(net.Dial("tcp", os.Getenv(wireVariable)))
	w := &Wire{
		orders: make(chan Order, 100), // more than a test gives while the process is paused
		resume: make(chan struct{}),
		pause:  stepIn(pauseVariable),
		encode: json.NewEncoder(conn),
	}
	w.Report("joined", pidNamespace())
	go w.obey(json.NewDecoder(conn))
	wire.Store(w)
	return w
}

func (w *Wire) obey(orders *json.Decoder) {
	for {
		var o Order
		if orders.Decode(&o) != nil {
			os.Exit(4) // the test has ended
		}
		switch o.Do {
		case resume:
			w.resume <- struct{}{}
		case limitDescriptors:
			w.ReportError(o.Do, Limit(unix.RLIMIT_NOFILE, Must(strconv.Atoi(o.Arguments[0]))))
		case countGoroutines:
			w.Report(o.Do, goroutines(Must(strconv.Atoi(o.Arguments[0]))))
		default:
			w.orders <- o
		}
	}
}

// pidNamespace names the PID namespace of this process. It is empty where there are none.
func pidNamespace() string {
	name, _ := os.Readlink("/proc/self/ns/pid")
	return name
}

// goroutines returns how many goroutines there are. Unless want is zero, it first waits
// until there are no more than that, because a goroutine that is done counts until it has
// ended.
func goroutines(want int) int {
	for end := time.Now().Add(Patience); want > 0 && runtime.NumGoroutine() > want && time.Now().Before(end); {
		runtime.Gosched()
	}
	return runtime.NumGoroutine()
}

// Orders returns the orders of the test, except those that every Wire obeys itself.
func (w *Wire) Orders() <-chan Order { return w.orders }

// Report is the function Report, for Process.Await. An event may have any name.
func (w *Wire) Report(event string, details ...any) {
	w.send(Message{Event: event, Text: textOf(details)})
}

// ReportError reports a result, whose Text is empty if err is nil.
func (w *Wire) ReportError(event string, err error) {
	m := Message{Event: event, Cause: CauseOf(err)}
	if err != nil {
		m.Text = err.Error()
	}
	w.send(m)
}

func (w *Wire) send(m Message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	m.PID = os.Getpid()
	_ = w.encode.Encode(m)
}

// Hang reports that this process hangs, and never returns.
func (w *Wire) Hang() {
	w.Report("hanging")
	select {}
}

func (w *Wire) reached(s step.Step) {
	w.mu.Lock()
	pauses := s == w.pause && s != (step.Step{})
	if pauses {
		w.pause = step.Step{}
	}
	w.mu.Unlock()

	if pauses {
		w.Report(paused, s) // first, because a test may suspend a process that has come to s
	}
	w.send(Message{Event: stepEvent(s)})
	if pauses {
		<-w.resume
	}
}

func stepEvent(s step.Step) string { return "step " + s.String() }

// A Process is the test's end of a Wire.
type Process struct {
	PID int // as its PID namespace sees it

	t       *testing.T
	foreign bool // in another PID namespace, where PID is of no use to the test
	encode  *json.Encoder
	reports mailbox // ends with the process
}

// Wire returns the variable for processes that open a Wire, each of which Next
// returns.
func (s *Service) Wire() string {
	s.t.Helper()
	if s.wire == nil {
		s.wire = Opened[net.Listener](s.t)(net.Listen("tcp", "127.0.0.1:0"))
		s.hearing.Go(func() { s.welcome(s.wire) })
	}
	return wireVariable + "=" + s.wire.Addr().String()
}

func (s *Service) welcome(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		s.hearing.Go(func() { s.hear(conn) })
	}
}

func (s *Service) hear(conn net.Conn) {
	p := &Process{t: s.t, encode: json.NewEncoder(conn)}
	defer p.reports.End()
	defer conn.Close()
	for decoder := json.NewDecoder(conn); ; {
		var m Message
		if decoder.Decode(&m) != nil {
			return
		}
		if p.PID == 0 {
			p.PID, p.foreign = m.PID, m.Text != pidNamespace()
			if !p.foreign {
				s.Watch(m.PID)
			}
			s.joined <- p
			continue
		}
		if m.Event == paused {
			s.did(hook{paused, m.Text})
			continue
		}
		p.reports.Add(m)
	}
}

// Next returns the next process that has opened its wire. If it is in another PID
// namespace, the test itself must kill it.
func (s *Service) Next() *Process {
	s.t.Helper()
	return Within(s.t, "another process", s.joined)
}

// Order sends the process an order. The process may report when it has obeyed.
func (p *Process) Order(do string, arguments ...string) {
	p.t.Helper()
	if err := p.encode.Encode(Order{do, arguments}); err != nil {
		p.t.Fatalf("order %d to %s: %v", p.PID, do, err)
	}
}

// Resume lets a process go on that was paused at a step.
func (p *Process) Resume() {
	p.t.Helper()
	p.Order(resume)
}

// Await returns the next report of this event. Reports before it are dropped.
func (p *Process) Await(event string) Message {
	p.t.Helper()
	return p.await(event, true)
}

// AwaitStep waits until the process has come to a step. What it has reported before
// is dropped.
func (p *Process) AwaitStep(at step.Step) {
	p.t.Helper()
	p.await(stepEvent(at), true)
}

// Take does what Await does, but drops nothing. It is for events that need not come in a
// certain order.
func (p *Process) Take(event string) Message {
	p.t.Helper()
	return p.await(event, false)
}

func (p *Process) await(event string, drop bool) Message {
	p.t.Helper()
	m, before, ok := p.reports.await(event, drop)
	if !ok {
		p.t.Fatalf("waited for %q of process %d, got %v", event, p.PID, before)
	}
	return m
}

// AwaitEnd waits until the process is dead and the kernel has closed its descriptors. For
// a process in another PID namespace, it waits only for the end of its wire.
func (p *Process) AwaitEnd() {
	p.t.Helper()
	if !p.reports.AwaitEnd() {
		p.t.Fatalf("process %d is still running", p.PID)
	}
	if !p.foreign {
		AwaitDeath(p.t, p.PID)
	}
}

// LimitDescriptors sets the process's limit of open files, to the greatest possible
// if n is negative.
func (p *Process) LimitDescriptors(n int) {
	p.t.Helper()
	p.Order(limitDescriptors, strconv.Itoa(n))
	if m := p.Await(limitDescriptors); m.Text != "" {
		p.t.Fatal(m.Text)
	}
}

// CountGoroutines returns how many goroutines the process has, after waiting until
// there are no more than want, unless that is zero.
func (p *Process) CountGoroutines(want int) int {
	p.t.Helper()
	p.Order(countGoroutines, strconv.Itoa(want))
	n, err := strconv.Atoi(p.Await(countGoroutines).Text)
	OK(p.t, err)
	return n
}
