//go:build unix

package handovertest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/trial"
)

// A chain is a service whose processes, its generations, all play the role
// "generation" and do what the test orders. Every generation answers with its PID on a
// TCP listener, a Unix listener and a UDP socket, from Ready on, because a request that a
// child accepts before is lost if the child dies.

const (
	dirVariable     = "HANDOVERTEST_DIR"     // directory of the PID file and the Unix socket
	mishapVariable  = "HANDOVERTEST_MISHAP"  // a name in mishaps, for one generation
	timeoutVariable = "HANDOVERTEST_TIMEOUT" // UpgradeTimeout, for one generation
	trialVariable   = "HANDOVERTEST_TRIAL"   // Trial, for one generation
	linkVariable    = "HANDOVERTEST_LINK"    // where the first generation dials a connection to pass on

	// Set for one generation that does not begin to count the time of a trial before it is
	// told to.
	holdVariable = "HANDOVERTEST_HOLD"
	// For all generations.
	maxDrainingVariable = "HANDOVERTEST_MAXDRAINING"
	// For one generation, how long it waits for a child's acknowledgement.
	acknowledgeVariable = "HANDOVERTEST_ACKNOWLEDGE"
	// For one generation, how long a child gets to exit by itself.
	graceVariable = "HANDOVERTEST_GRACE"
	// For one generation, which user its children belong to.
	childUserVariable = "HANDOVERTEST_CHILD_USER"
	// For one generation, a step at which it starts a process that keeps its pipes.
	forkVariable = "HANDOVERTEST_FORK"
	// Set if pipes look as on OpenBSD.
	anonymousVariable = "HANDOVERTEST_ANONYMOUS"
)

// The steps of a generation beside those of the handover.
var (
	started      = step.New("started")
	beforeNew    = step.New("before New")
	starting     = step.New("starting a child")
	newReturned  = step.New("New has returned")
	claimed      = step.New("claimed")
	tryingAgain  = step.New("trying Ready again")
	readyReturns = step.New("Ready has returned")
	alone        = step.New("alone")
)

// lingers is for a generation whose children do not exit by themselves.
const lingers = graceVariable + "=20ms"

// shorten makes a timeout short, for tests in which it passes.
func shorten(t *testing.T, timeout *time.Duration) { proctest.Set(t, timeout, 20*time.Millisecond) }

// hearNothingLater has this process hear only what a child has said already when it waits for
// an acknowledgement, or for the end of a line: it may have been suspended meanwhile.
func hearNothingLater(t *testing.T) {
	proctest.Set(t, &step.AcknowledgeTimeout, 1)
	proctest.Set(t, &step.LineGrace, 0)
}

// A mishap is something other than death that happens to a generation that has claimed
// its sockets.
type mishap func(*proctest.Wire, *tableflip.Upgrader)

// missingDirectory is a mishap that happens earlier.
const missingDirectory = "missing directory"

func init() {
	proctest.Role("generation", func() {
		w := proctest.OpenWire()
		step.Reached(started)
		step.Reached(beforeNew)

		g := &generation{wire: w, goOn: make(chan struct{})}
		if proctest.Take(holdVariable) != "" {
			proctest.When(step.TrialBegun, func() { <-g.goOn })
		}
		timeout, _ := time.ParseDuration(proctest.Take(timeoutVariable))
		trialTime, _ := time.ParseDuration(proctest.Take(trialVariable))
		maxDraining, _ := strconv.Atoi(os.Getenv(maxDrainingVariable))
		if text := proctest.Take(acknowledgeVariable); text != "" {
			step.AcknowledgeTimeout = proctest.Must(time.ParseDuration(text))
		}
		if text := proctest.Take(graceVariable); text != "" {
			step.ExitGrace = proctest.Must(time.ParseDuration(text))
		} else if trialTime > 0 {
			step.ExitGrace = time.Second // which passes, because a child drains that was on trial
		}
		if name := proctest.Take(forkVariable); name != "" {
			proctest.When(proctest.Must(step.Parse(name)), func() { w.Report("forked", keepPipes()) })
		}
		descriptor.AnonymousPipes = os.Getenv(anonymousVariable) != ""
		childUser := proctest.Take(childUserVariable)
		if childUser != "" {
			step.KillTimeout = time.Second // which passes, because the child can't be killed
		}
		happens := proctest.Take(mishapVariable)
		dir := os.Getenv(dirVariable)
		pidFile := filepath.Join(dir, "pid")
		if happens == missingDirectory {
			pidFile = filepath.Join(dir, "missing", "pid")
		}
		g.upg = proctest.Must(tableflip.New(tableflip.Options{
			PIDFile:        pidFile,
			UpgradeTimeout: timeout,
			Trial:          trialTime,
			MaxDraining:    maxDraining,
			Command: func(cmd *exec.Cmd) {
				cmd.Env = append(cmd.Env, g.childEnv.Load().([]string)...)
				if childUser != "" {
					belongTo(cmd, childUser)
				}
				step.Reached(starting)
			},
		}))
		step.Reached(newReturned)

		g.claim(dir)
		step.Reached(claimed)
		switch happens {
		case "", missingDirectory:
		default:
			mishaps[happens](w, g.upg)
		}

		if err := g.upg.Ready(); err != nil {
			w.ReportError("refused", err)
			os.Exit(2)
		}
		step.Reached(readyReturns)
		g.serve()
		if trial.IsOn() || trial.WasUndone() || maxDraining > 0 {
			go g.awaitAlone()
		} else {
			proctest.Must(0, g.upg.WaitForParent(context.Background()))
			step.Reached(alone)
		}
		g.obeyUntilExit()
	})
}

// A generation is one process of a chain.
type generation struct {
	wire     *proctest.Wire
	upg      *tableflip.Upgrader
	childEnv atomic.Value // []string, added to the environment of the next child
	cancel   atomic.Value // context.CancelCauseFunc, of the upgrade under way
	goOn     chan struct{}

	tcp, unix net.Listener
	udp       net.PacketConn
	link      net.Conn // to the test, if it asked for that
	serving   sync.WaitGroup
}

// awaitAlone waits while others, or orders, come first.
func (g *generation) awaitAlone() {
	if err := g.upg.WaitForParent(context.Background()); err != nil {
		g.wire.ReportError("never alone", err)
		return
	}
	step.Reached(alone)
}

func (g *generation) claim(dir string) {
	g.tcp = proctest.Must(g.upg.Listen("tcp", "127.0.0.1:0"))
	g.unix = proctest.Must(g.upg.Listen("unix", filepath.Join(dir, "socket")))
	g.udp = proctest.Must(g.upg.ListenPacket("udp", "127.0.0.1:0"))
	if addr := os.Getenv(linkVariable); addr != "" {
		g.claimLink(addr, dir)
	}
	g.wire.Report("addresses", g.tcp.Addr(), g.udp.LocalAddr())
}

// claimLink claims a connection to the test, and a file that every generation adds to.
func (g *generation) claimLink(addr, dir string) {
	g.link = proctest.Must(g.upg.Conn("tcp", "link"))
	if g.link == nil {
		g.link = proctest.Must(net.Dial("tcp", addr))
		proctest.Must(0, g.upg.AddConn("tcp", "link", g.link.(tableflip.Conn)))
	}
	journal := proctest.Must(g.upg.File("journal"))
	if journal == nil {
		journal = proctest.Must(os.Create(filepath.Join(dir, "journal")))
		proctest.Must(0, g.upg.AddFile("journal", journal))
	}
	proctest.Must(fmt.Fprintln(journal, os.Getpid()))
	journal.Close()
}

func (g *generation) serve() {
	g.serving.Go(func() { answerStreams(g.tcp, &g.serving) })
	g.serving.Go(func() { answerStreams(g.unix, &g.serving) })
	g.serving.Go(func() { answerPackets(g.udp) })
	if g.link != nil {
		go func() {
			for lines := bufio.NewScanner(g.link); lines.Scan(); {
				fmt.Fprintln(g.link, os.Getpid())
			}
		}()
	}
}

func answerStreams(ln net.Listener, handlers *sync.WaitGroup) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		handlers.Go(func() {
			defer conn.Close()
			if _, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
				fmt.Fprintln(conn, os.Getpid())
			}
		})
	}
}

func answerPackets(conn net.PacketConn) {
	defer conn.Close()
	buffer := make([]byte, 100)
	for {
		_, from, err := conn.ReadFrom(buffer)
		if err != nil {
			return
		}
		conn.WriteTo(fmt.Appendln(nil, os.Getpid()), from)
	}
}

// obeyUntilExit returns when Exit is closed, and all that has been received is answered.
func (g *generation) obeyUntilExit() {
	var obeying sync.WaitGroup
	var answered <-chan bool
	for exit := g.upg.Exit(); ; {
		select {
		case <-exit:
			exit = nil
			g.tcp.Close()
			g.unix.Close()
			g.udp.SetReadDeadline(time.Unix(1, 0))
			g.wire.Report("closed")
			answered = proctest.Waited(&g.serving)
		case <-answered:
			obeying.Wait()
			return
		case o := <-g.wire.Orders():
			obeying.Go(func() { g.obey(o) })
		}
	}
}

func (g *generation) obey(o proctest.Order) {
	switch o.Do {
	case "upgrade": // to a child that has the arguments in its environment
		g.childEnv.Store(o.Arguments)
		ctx, cancel := context.WithCancelCause(context.Background())
		defer cancel(nil)
		g.cancel.Store(cancel)
		g.wire.ReportError("upgraded", g.upg.UpgradeContext(ctx))
	case "go on":
		close(g.goOn)
	case "cancel":
		g.cancel.Load().(context.CancelCauseFunc)(nil)
		g.wire.Report("cancelled")
	case "expire":
		g.cancel.Load().(context.CancelCauseFunc)(context.DeadlineExceeded)
	case "upgrade patiently": // whatever the timeouts are
		step.AcknowledgeTimeout, step.MaxTrial = proctest.Patience, time.Millisecond
		g.childEnv.Store(o.Arguments)
		ctx, cancel := context.WithTimeout(context.Background(), proctest.Patience)
		defer cancel()
		g.wire.ReportError("upgraded", g.upg.UpgradeContext(ctx))
	case "upgrade until": // a deadline, which passes when the test says so
		g.childEnv.Store(o.Arguments)
		limited, end := context.WithTimeout(context.Background(), time.Hour)
		defer end()
		ctx, cancel := context.WithCancelCause(limited)
		g.cancel.Store(cancel)
		g.wire.ReportError("upgraded", g.upg.UpgradeContext(ctx))
	case "rehearse":
		g.childEnv.Store(o.Arguments)
		ctx, cancel := context.WithCancelCause(context.Background())
		defer cancel(nil)
		g.cancel.Store(cancel)
		g.wire.ReportError("rehearsed", g.upg.Rehearse(ctx))
	case "stop":
		g.wire.Report("stopping")
		g.upg.Stop()
		g.wire.Report("stopped")
	case "fail":
		g.upg.Fail(errors.New("no disk"))
		g.wire.Report("failed")
	case "undo": // as package service does
		g.wire.Report("undone", trial.Undo(errors.New("unhealthy")))
	case "exit":
		os.Exit(7)
	case "await the end of the trial":
		<-trial.Ended()
		g.wire.Report("trial ended", trial.WasUndone())
	case "look":
		text := lineage(g.upg)
		for _, is := range []struct {
			name string
			is   bool
		}{
			{"exit", proctest.IsClosed(g.upg.Exit())},
			{"replaced", g.upg.Replaced()},
			{"hurry", proctest.IsClosed(g.upg.Hurry())},
		} {
			if is.is {
				text += ", " + is.name
			}
		}
		g.wire.Report("look", text)
	}
}

// A chain is the test's view of it.
type chain struct {
	*proctest.Service
	t        *testing.T
	dir      string
	workDir  string // of the first generation, if it is not the test's
	program  string // of all generations, if it is not the test's
	tcp, udp string // addresses
}

// newChain makes room for a chain, which start starts.
func newChain(t *testing.T) *chain {
	t.Helper()
	dir := proctest.SocketDir(t)
	return &chain{Service: proctest.NewService(t), t: t, dir: dir}
}

// start starts a first generation, with env in its environment. The channel is
// closed when it has been reaped.
func (c *chain) start(env ...string) (*proctest.Process, <-chan struct{}) {
	c.t.Helper()
	cmd := c.Command("generation", append(env, c.Wire(), dirVariable+"="+c.dir)...)
	if c.program != "" {
		cmd.Path, cmd.Args = c.program, []string{c.program}
	}
	if c.workDir != "" {
		self, err := os.Executable()
		proctest.OK(c.t, err)
		cmd.Path, cmd.Args, cmd.Dir = self, []string{self}, c.workDir
	}
	reaped := c.Start(cmd)
	g := c.Next()
	addresses := strings.Fields(g.Await("addresses").Text)
	c.tcp, c.udp = addresses[0], addresses[1]
	return g, reaped
}

// startChain starts a chain and waits for its first generation to serve.
func startChain(t *testing.T, env ...string) (*chain, *proctest.Process, <-chan struct{}) {
	t.Helper()
	c := newChain(t)
	g, reaped := c.start(env...)
	g.AwaitStep(alone)
	return c, g, reaped
}

// upgrade replaces g by a new generation, which it returns once g has ended.
func (c *chain) upgrade(g *proctest.Process) *proctest.Process {
	c.t.Helper()
	g.Order("upgrade patiently")
	if m := g.Await("upgraded"); m.Text != "" {
		c.t.Fatalf("upgrade: %s", m.Text)
	}
	next := c.Next()
	next.AwaitStep(alone)
	g.AwaitEnd()
	return next
}

// removeSocket removes the Unix socket's file, which after a crash is in the way
// of a new one.
func (c *chain) removeSocket() {
	c.t.Helper()
	proctest.OK(c.t, os.Remove(filepath.Join(c.dir, "socket")))
}

// A request has been sent, and has not been answered yet.
type request struct {
	network string
	conn    net.Conn
}

// send sends a request to each of the sockets, to be answered by whoever serves.
func (c *chain) send() []request {
	c.t.Helper()
	var requests []request
	for _, socket := range []struct{ network, addr string }{
		{"tcp", c.tcp},
		{"udp", c.udp},
		{"unix", filepath.Join(c.dir, "socket")},
	} {
		conn := proctest.Opened[net.Conn](c.t)(net.DialTimeout(socket.network, socket.addr, proctest.Patience))
		_, err := io.WriteString(conn, "who\n")
		proctest.OK(c.t, err)
		requests = append(requests, request{socket.network, conn})
	}
	return requests
}

// wantAnswers checks that the requests are answered, by the process with pid.
func (c *chain) wantAnswers(requests []request, pid int) {
	c.t.Helper()
	for _, r := range requests {
		r.conn.SetReadDeadline(time.Now().Add(proctest.Patience))
		reader := bufio.NewReader(r.conn)
		answer, err := reader.ReadString('\n')
		if err != nil || answer != fmt.Sprintln(pid) {
			c.t.Errorf("%s request answered with %q, %v; want %d", r.network, answer, err, pid)
		}
		if r.network != "udp" {
			// The process has closed its side now.
			if _, err := reader.ReadByte(); err != io.EOF {
				c.t.Errorf("%s connection after the answer: %v", r.network, err)
			}
		}
		r.conn.Close()
	}
}

// wantCharge checks that the process with pid serves, that the PID file names it, and
// that the Unix socket and the PID file are the only files.
func (c *chain) wantCharge(pid int) {
	c.t.Helper()
	c.wantAnswers(c.send(), pid)
	c.wantFiles("pid", "socket")
	c.wantPIDFile(pid)
}

func (c *chain) wantFiles(want ...string) {
	c.t.Helper()
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		c.t.Error(err)
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	if !slices.Equal(names, want) {
		c.t.Errorf("files are %q, want %q", names, want)
	}
}

func (c *chain) wantPIDFile(pid int) {
	c.t.Helper()
	content, err := os.ReadFile(filepath.Join(c.dir, "pid"))
	if err != nil || string(content) != strconv.Itoa(pid) {
		c.t.Errorf("the PID file holds %q, %v; want %d", content, err, pid)
	}
}

// wantGoesOn checks that g can be upgraded, and then the chain be stopped.
func (c *chain) wantGoesOn(g *proctest.Process) {
	c.t.Helper()
	next := c.upgrade(g)
	c.wantCharge(next.PID)
	c.wantStop(next)
}

// wantStop stops g and checks that nothing is left of the service.
func (c *chain) wantStop(g *proctest.Process) {
	c.t.Helper()
	g.Order("stop")
	g.Await("stopped")
	c.wantFiles()
	g.AwaitEnd()
	c.AwaitEnd()
}

func TestChain(t *testing.T) {
	t.Parallel()
	const generations = 50
	test, err := net.Listen("tcp", "127.0.0.1:0")
	proctest.OK(t, err)
	defer test.Close()
	c := newChain(t)
	g, _ := c.start(linkVariable + "=" + test.Addr().String())
	link, err := test.Accept()
	proctest.OK(t, err)
	defer link.Close()
	answers := bufio.NewReader(link)
	g.AwaitStep(alone)

	wantGoroutines := g.CountGoroutines(0)
	var wantFiles map[string]int
	var journal strings.Builder
	for i := 1; ; i++ {
		fmt.Fprintln(&journal, g.PID)
		c.wantAnswers(c.send(), g.PID)
		c.wantPIDFile(g.PID)
		c.wantFiles("journal", "pid", "socket")
		link.SetDeadline(time.Now().Add(proctest.Patience))
		fmt.Fprintln(link, "who")
		if answer, err := answers.ReadString('\n'); err != nil || answer != fmt.Sprintln(g.PID) {
			t.Fatalf("generation %d answered %q, %v over the connection from the first; want %d", i, answer, err, g.PID)
		}
		if got := g.CountGoroutines(wantGoroutines); got != wantGoroutines {
			t.Errorf("generation %d has %d goroutines, want %d", i, got, wantGoroutines)
		}
		files := proctest.KindsOf(proctest.OpenFiles(t, g.PID))
		if i == 1 && len(files) > 0 {
			// It holds the link twice: its own and the registry's.
			files["socket"]--
			wantFiles = files
		}
		if !maps.Equal(files, wantFiles) {
			t.Errorf("generation %d has the descriptors %v, want %v", i, files, wantFiles)
		}
		if i == generations || t.Failed() {
			break
		}
		g = c.upgrade(g)
	}
	if got, err := os.ReadFile(filepath.Join(c.dir, "journal")); err != nil || string(got) != journal.String() {
		t.Errorf("the passed file holds %q, %v; want %q", got, err, journal.String())
	}
	os.Remove(filepath.Join(c.dir, "journal"))
	c.wantStop(g)
}
