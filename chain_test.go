//go:build unix

package tableflip_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/step"
	"golang.org/x/sys/unix"
)

// A chain is a service whose processes, its generations, all play the role
// "generation" and do what the test orders: each has a connection to the test,
// its wire, by which it tells every step that it has come to, may be paused
// there, and receives orders.
//
// Every generation answers with its PID on a TCP listener, a Unix listener and a
// UDP socket, from Ready on. Others accept earlier; here a child must not take
// a request into its grave.

const (
	wireVariable    = "TABLEFLIP_TEST_WIRE"    // address of the test
	dirVariable     = "TABLEFLIP_TEST_DIR"     // directory of the PID file and the Unix socket
	pauseVariable   = "TABLEFLIP_TEST_PAUSE"   // a step to wait at, for this generation
	mishapVariable  = "TABLEFLIP_TEST_MISHAP"  // a name in mishaps, for this generation
	timeoutVariable = "TABLEFLIP_TEST_TIMEOUT" // UpgradeTimeout, for this generation
	linkVariable    = "TABLEFLIP_TEST_LINK"    // where the first generation dials a connection to pass on
)

// mishaps are what can happen to a generation that has claimed its sockets, apart
// from death.
var mishaps = map[string]func(*wire, *tableflip.Upgrader){}

// An order is what the test sends to a generation.
type order struct {
	Do  string
	Env []string // to "upgrade": added to the child's
	N   int      // to "limit descriptors" and "count goroutines"
}

// A notice is what a generation sends to the test: a step that it has come to, or
// the result of an order.
type notice struct {
	PID   int
	Step  string
	Text  string // of an error, if it is a result
	Cause string // of that error, see causeOf
}

// causeOf names what errors.Is and errors.As find in err.
func causeOf(err error) string {
	var exit *exec.ExitError
	var errno syscall.Errno
	switch {
	case errors.As(err, &exit):
		return exit.ProcessState.String()
	case errors.As(err, &errno):
		return errno.Error()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "deadline"
	}
	return ""
}

// A wire is a generation's end of its connection to the test.
type wire struct {
	orders chan order
	resume chan struct{}
	pause  string

	mu     sync.Mutex
	encode *json.Encoder
}

func openWire() *wire {
	conn := must(net.Dial("tcp", os.Getenv(wireVariable)))
	w := &wire{
		orders: make(chan order),
		resume: make(chan struct{}),
		pause:  os.Getenv(pauseVariable),
		encode: json.NewEncoder(conn),
	}
	go func() {
		for decoder := json.NewDecoder(conn); ; {
			var o order
			if decoder.Decode(&o) != nil {
				os.Exit(4) // the test has ended
			}
			if o.Do == "resume" {
				w.resume <- struct{}{}
				continue
			}
			w.orders <- o
		}
	}()
	return w
}

func (w *wire) send(n notice) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n.PID = os.Getpid()
	_ = w.encode.Encode(n)
}

// tell tells a result.
func (w *wire) tell(what string, err error) {
	n := notice{Step: what, Cause: causeOf(err)}
	if err != nil {
		n.Text = err.Error()
	}
	w.send(n)
}

// step is called at every step that this generation comes to.
func (w *wire) step(step string) {
	if step == os.Getenv(faultVariable) {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	w.send(notice{Step: step})
	if step == w.pause {
		<-w.resume
	}
}

// hang tells the test, and never returns.
func (w *wire) hang() {
	w.send(notice{Step: "hanging"})
	select {}
}

func init() {
	roles["generation"] = func() {
		w := openWire()
		step.SetHook(func(s step.Step) { w.step(s.String()) })
		w.step("started")
		w.step("before New")

		var childEnv atomic.Value
		timeout, _ := time.ParseDuration(os.Getenv(timeoutVariable))
		dir := os.Getenv(dirVariable)
		pidFile := filepath.Join(dir, "pid")
		if os.Getenv(mishapVariable) == "missing directory" {
			pidFile = filepath.Join(dir, "missing", "pid")
		}
		upg := must(tableflip.New(tableflip.Options{
			PIDFile:        pidFile,
			UpgradeTimeout: timeout,
			Command: func(cmd *exec.Cmd) {
				cmd.Env = slices.DeleteFunc(cmd.Env, func(variable string) bool {
					name, _, _ := strings.Cut(variable, "=")
					return name == faultVariable || name == pauseVariable || name == mishapVariable || name == timeoutVariable
				})
				cmd.Env = append(cmd.Env, childEnv.Load().([]string)...)
				w.step("starting")
			},
		}))
		w.step("new")

		tcp := must(upg.Listen("tcp", "127.0.0.1:0"))
		unixLn := must(upg.Listen("unix", filepath.Join(dir, "socket")))
		udp := must(upg.ListenPacket("udp", "127.0.0.1:0"))
		extras := claimExtras(upg, dir)
		w.send(notice{Step: "addresses", Text: tcp.Addr().String() + " " + udp.LocalAddr().String()})
		w.step("claimed")
		if mishap := mishaps[os.Getenv(mishapVariable)]; mishap != nil {
			mishap(w, upg)
		}

		if err := upg.Ready(); err != nil {
			w.tell("refused", err)
			os.Exit(2)
		}
		w.step("ready")
		var serving sync.WaitGroup
		serving.Go(func() { answerStreams(tcp, &serving) })
		serving.Go(func() { answerStreams(unixLn, &serving) })
		serving.Go(func() { answerPackets(udp) })
		extras.serve()
		if err := upg.WaitForParent(context.Background()); err != nil {
			panic(err)
		}
		w.step("alone")

		var ordered sync.WaitGroup
		for {
			select {
			case <-upg.Exit():
				// Of what has been received, all is answered.
				tcp.Close()
				unixLn.Close()
				udp.SetReadDeadline(time.Unix(1, 0))
				serving.Wait()
				ordered.Wait()
				return
			case o := <-w.orders:
				ordered.Go(func() { w.obey(o, upg, &childEnv) })
			}
		}
	}
}

func (w *wire) obey(o order, upg *tableflip.Upgrader, childEnv *atomic.Value) {
	switch o.Do {
	case "upgrade":
		childEnv.Store(o.Env)
		w.tell("upgraded", upg.Upgrade())
	case "upgrade patiently": // whatever the UpgradeTimeout is
		childEnv.Store(o.Env)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		w.tell("upgraded", upg.UpgradeContext(ctx))
	case "stop":
		upg.Stop()
		w.tell("stopped", nil)
	case "limit descriptors":
		w.tell("limited", limit(syscall.RLIMIT_NOFILE, o.N))
	case "count goroutines":
		w.send(notice{Step: "goroutines", Text: strconv.Itoa(countGoroutines(o.N))})
	}
}

// limit sets a limit of this process, to the greatest possible if n is negative.
func limit(resource, n int) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(resource, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if n >= 0 {
		assign(&limit.Cur, n)
	}
	return syscall.Setrlimit(resource, &limit)
}

// assign is for fields whose type is not the same on all systems.
func assign[T int64 | uint64](field *T, n int) { *field = T(n) }

// countGoroutines returns how many there are beside the caller's, after waiting
// until there are no more than want, unless that is zero: one that has nothing left
// to do counts until it has ended.
func countGoroutines(want int) int {
	for end := time.Now().Add(patience); want > 0 && runtime.NumGoroutine()-1 > want && time.Now().Before(end); {
		runtime.Gosched()
	}
	return runtime.NumGoroutine() - 1
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

// extras are what a generation passes on beside its sockets, if the test asked
// for it: a connection to the test, and a file that every generation adds to.
type extras struct {
	link net.Conn
}

func claimExtras(upg *tableflip.Upgrader, dir string) extras {
	testAddr := os.Getenv(linkVariable)
	if testAddr == "" {
		return extras{}
	}
	link := must(upg.Conn("tcp", "link"))
	if link == nil {
		link = must(net.Dial("tcp", testAddr))
		if err := upg.AddConn("tcp", "link", link.(tableflip.Conn)); err != nil {
			panic(err)
		}
	}
	journal := must(upg.File("journal"))
	if journal == nil {
		journal = must(os.Create(filepath.Join(dir, "journal")))
		if err := upg.AddFile("journal", journal); err != nil {
			panic(err)
		}
	}
	must(fmt.Fprintln(journal, os.Getpid()))
	journal.Close()
	return extras{link}
}

// serve answers lines on the link with the PID.
func (e extras) serve() {
	if e.link == nil {
		return
	}
	go func() {
		for lines := bufio.NewScanner(e.link); lines.Scan(); {
			fmt.Fprintln(e.link, os.Getpid())
		}
	}()
}

// chain is the test's view of a chain.
type chain struct {
	*service
	dir      string
	workDir  string // of the first generation, if it is not the test's
	listener net.Listener
	joined   chan *generation
	tcp, udp string // addresses
}

// A generation is the test's view of one process of a chain.
type generation struct {
	t       *testing.T
	pid     int
	encode  *json.Encoder
	notices chan notice // closed when the process has ended
}

// newChain makes room for a chain, which start starts.
func newChain(t *testing.T) *chain {
	t.Helper()
	dir := shortDir(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &chain{
		service:  newService(t),
		dir:      dir,
		listener: ln,
		joined:   make(chan *generation, 100),
	}
	t.Cleanup(func() { ln.Close() })
	go c.welcome()
	return c
}

func (c *chain) welcome() {
	for {
		conn, err := c.listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			g := &generation{t: c.t, encode: json.NewEncoder(conn), notices: make(chan notice, 1000)}
			defer close(g.notices)
			for decoder := json.NewDecoder(conn); ; {
				var n notice
				if decoder.Decode(&n) != nil {
					return
				}
				if g.pid == 0 {
					g.pid = n.PID
					c.watch(n.PID)
					c.joined <- g
				}
				g.notices <- n
			}
		}()
	}
}

// start starts a first generation, with env in its environment. The channel is
// closed when it has been reaped.
func (c *chain) start(env ...string) (*generation, chan struct{}) {
	c.t.Helper()
	cmd := c.command("generation", append(env,
		wireVariable+"="+c.listener.Addr().String(),
		dirVariable+"="+c.dir,
		// Nobody looks at the exit status of later generations.
		"GORACE=halt_on_error=1 "+os.Getenv("GORACE"))...)
	if c.workDir != "" {
		self, err := os.Executable()
		if err != nil {
			c.t.Fatal(err)
		}
		cmd.Path, cmd.Args[0], cmd.Dir = self, self, c.workDir
	}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	reaped := make(chan struct{})
	go func() {
		cmd.Wait()
		close(reaped)
	}()
	c.t.Cleanup(func() {
		cmd.Process.Kill()
		<-reaped
	})
	g := c.next()
	addresses := strings.Fields(g.await("addresses").Text)
	c.tcp, c.udp = addresses[0], addresses[1]
	return g, reaped
}

// startChain starts a chain and waits for its first generation to serve.
func startChain(t *testing.T, env ...string) (*chain, *generation, chan struct{}) {
	t.Helper()
	c := newChain(t)
	g, reaped := c.start(env...)
	g.await("alone")
	return c, g, reaped
}

// next returns the generation that was started next.
func (c *chain) next() *generation {
	c.t.Helper()
	select {
	case g := <-c.joined:
		return g
	case <-time.After(patience):
		c.t.Fatal("no process was started")
		return nil
	}
}

// upgrade replaces g by a new generation, which it returns once g has ended.
func (c *chain) upgrade(g *generation) *generation {
	c.t.Helper()
	g.order("upgrade patiently")
	if n := g.await("upgraded"); n.Text != "" {
		c.t.Fatalf("upgrade: %s", n.Text)
	}
	next := c.next()
	next.await("alone")
	g.awaitEnd()
	return next
}

func (g *generation) order(do string, childEnv ...string) {
	g.t.Helper()
	g.send(order{Do: do, Env: childEnv})
}

func (g *generation) send(o order) {
	g.t.Helper()
	if err := g.encode.Encode(o); err != nil {
		g.t.Fatalf("order %d to %s: %v", g.pid, o.Do, err)
	}
}

// limitDescriptors sets the process's limit of open files, to the greatest
// possible if n is negative.
func (g *generation) limitDescriptors(n int) {
	g.t.Helper()
	g.send(order{Do: "limit descriptors", N: n})
	if n := g.await("limited"); n.Text != "" {
		g.t.Fatal(n.Text)
	}
}

// countGoroutines does what the function of this name does, in the process.
func (g *generation) countGoroutines(want int) int {
	g.t.Helper()
	g.send(order{Do: "count goroutines", N: want})
	n, err := strconv.Atoi(g.await("goroutines").Text)
	if err != nil {
		g.t.Fatal(err)
	}
	return n
}

// await returns the next notice of this step. Others before it are dropped.
func (g *generation) await(step string) notice {
	g.t.Helper()
	timeout := time.After(patience)
	var dropped []notice
	for {
		select {
		case n, ok := <-g.notices:
			if !ok {
				g.t.Fatalf("waited for %d to come to %q, and it ended after %v", g.pid, step, dropped)
			}
			if n.Step == step {
				return n
			}
			dropped = append(dropped, n)
		case <-timeout:
			g.t.Fatalf("waited for %d to come to %q, got %v", g.pid, step, dropped)
		}
	}
}

// awaitDeath waits until a process whose wire has ended is dead. The system's own
// test file sets it; without it the end of the wire must do.
var awaitDeath = func(t *testing.T, pid int) {}

// awaitEnd waits until the process is dead: the kernel has closed its descriptors.
func (g *generation) awaitEnd() {
	g.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case _, ok := <-g.notices:
			if !ok {
				awaitDeath(g.t, g.pid)
				return
			}
		case <-timeout:
			g.t.Fatalf("%d still runs", g.pid)
		}
	}
}

// A request is one that has been sent and not been answered yet.
type request struct {
	network string
	conn    net.Conn
}

// send sends a request to each of the sockets, to be answered by whoever serves.
func (c *chain) send() []request {
	c.t.Helper()
	var requests []request
	for network, addr := range map[string]string{"tcp": c.tcp, "udp": c.udp, "unix": filepath.Join(c.dir, "socket")} {
		conn, err := net.DialTimeout(network, addr, patience)
		if err != nil {
			c.t.Fatal(err)
		}
		c.t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, "who\n"); err != nil {
			c.t.Fatal(err)
		}
		requests = append(requests, request{network, conn})
	}
	return requests
}

// expectAnswers checks that the requests are answered, by the process with pid.
func (c *chain) expectAnswers(requests []request, pid int) {
	c.t.Helper()
	for _, r := range requests {
		r.conn.SetReadDeadline(time.Now().Add(patience))
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

// expectCharge checks that the process with pid serves, and is the one whom the
// PID file names, and that the Unix socket and the PID file are the only files.
func (c *chain) expectCharge(pid int) {
	c.t.Helper()
	c.expectAnswers(c.send(), pid)
	c.expectFiles("pid", "socket")
	c.expectPIDFile(pid)
}

func (c *chain) expectFiles(want ...string) {
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

func (c *chain) expectPIDFile(pid int) {
	c.t.Helper()
	content, err := os.ReadFile(filepath.Join(c.dir, "pid"))
	if err != nil || string(content) != strconv.Itoa(pid) {
		c.t.Errorf("the PID file holds %q, %v; want %d", content, err, pid)
	}
}

// expectStop stops g and checks that nothing is left of the service.
func (c *chain) expectStop(g *generation) {
	c.t.Helper()
	g.order("stop")
	g.await("stopped")
	c.expectFiles()
	g.awaitEnd()
	c.awaitEnd()
}

// openFiles returns what the descriptors of a process refer to, by number. It is
// empty where there is no /proc.
func openFiles(t *testing.T, pid int) map[string]string {
	t.Helper()
	files := map[string]string{}
	if runtime.GOOS != "linux" {
		return files
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		// The one that ReadDir used, if this is the process itself, is gone.
		if target, err := os.Readlink(filepath.Join(dir, entry.Name())); err == nil {
			files[entry.Name()] = target
		}
	}
	return files
}

// kindsOf returns how many descriptors of each kind there are.
func kindsOf(files map[string]string) map[string]int {
	kinds := map[string]int{}
	for target := range maps.Values(files) {
		kind, _, _ := strings.Cut(target, ":[")
		kinds[kind]++
	}
	return kinds
}

func TestChainOfFiftyGenerations(t *testing.T) {
	t.Parallel()
	const generations = 50
	test, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer test.Close()
	c := newChain(t)
	g, _ := c.start(linkVariable + "=" + test.Addr().String())
	link, err := test.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	answers := bufio.NewReader(link)
	g.await("alone")

	wantGoroutines := g.countGoroutines(0)
	var wantFiles map[string]int
	var journal strings.Builder
	for i := 1; ; i++ {
		fmt.Fprintln(&journal, g.pid)
		c.expectAnswers(c.send(), g.pid)
		c.expectPIDFile(g.pid)
		c.expectFiles("journal", "pid", "socket")
		link.SetDeadline(time.Now().Add(patience))
		fmt.Fprintln(link, "who")
		if answer, err := answers.ReadString('\n'); err != nil || answer != fmt.Sprintln(g.pid) {
			t.Fatalf("generation %d answered %q, %v over the connection from the first; want %d", i, answer, err, g.pid)
		}
		if got := g.countGoroutines(wantGoroutines); got != wantGoroutines {
			t.Errorf("generation %d has %d goroutines, want %d", i, got, wantGoroutines)
		}
		files := kindsOf(openFiles(t, g.pid))
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
	c.expectStop(g)
}

const manyListeners = 4000

// manyName is the address by which the test knows a listener. It is long, so that
// the name table is longer than the longest variable that Linux passes on.
func manyName(i int) string {
	return fmt.Sprintf("%060d", i)
}

func init() {
	// many claims all listeners, and answers on each with its number.
	roles["many"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		for i := range manyListeners {
			ln := must(upg.Listener("unix", manyName(i)))
			if ln == nil {
				panic(fmt.Sprint("no listener ", i))
			}
			go func() {
				for {
					conn := must(ln.Accept())
					fmt.Fprint(conn, i)
					conn.Close()
				}
			}()
		}
		if err := upg.Ready(); err != nil {
			panic(err)
		}
		report("ready")
		select {}
	}
}

func TestUpgradeWithManyListeners(t *testing.T) {
	// The child holds each twice: its own and the registry's.
	const need = 2*manyListeners + 200
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Max < need {
		t.Skipf("needs %d descriptors, and the hard limit (ulimit -Hn) is %d", need, limit.Max)
	}
	if size := manyListeners * len(manyName(0)); size <= 128<<10 {
		t.Fatalf("the names are only %d bytes long", size)
	}

	upg, s := newParent(t, tableflip.Options{}, "many")
	// Not TCP, which would run out of ports if other tests do the same.
	dir := shortDir(t)
	path := func(i int) string { return filepath.Join(dir, strconv.Itoa(i)) }
	for i := range manyListeners {
		ln, err := net.Listen("unix", path(i))
		if err != nil {
			t.Fatal(err)
		}
		if err := upg.AddListener("unix", manyName(i), ln.(tableflip.Listener)); err != nil {
			t.Fatal(err)
		}
		ln.Close()
	}
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	s.await("ready")
	for i := 0; i < manyListeners; i += 93 {
		conn, err := net.DialTimeout("unix", path(i), patience)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(patience))
		if answer, err := io.ReadAll(conn); err != nil || string(answer) != strconv.Itoa(i) {
			t.Errorf("listener %d answered %q, %v", i, answer, err)
		}
		conn.Close()
	}
}

// A shareable is what can be passed on.
type shareable interface {
	io.Closer
	syscall.Conn
}

// shareables are of every kind, in both blocking modes where there are two.
var shareables = []struct {
	name string
	open func(t *testing.T) (shareable, error)
}{
	{"TCP listener", func(*testing.T) (shareable, error) {
		return net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	}},
	{"Unix listener", func(t *testing.T) (shareable, error) {
		return net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(shortDir(t), "socket"), Net: "unix"})
	}},
	{"UDP socket", func(*testing.T) (shareable, error) {
		return net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	}},
	{"Unix datagram socket", func(t *testing.T) (shareable, error) {
		return net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(shortDir(t), "socket"), Net: "unixgram"})
	}},
	{"TCP connection", func(t *testing.T) (shareable, error) {
		ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { ln.Close() })
		return net.DialTCP("tcp", nil, ln.Addr().(*net.TCPAddr))
	}},
	{"pipe", func(t *testing.T) (shareable, error) {
		read, write, err := os.Pipe()
		t.Cleanup(func() { write.Close() })
		return read, err
	}},
	{"blocking pipe", func(t *testing.T) (shareable, error) {
		var ends [2]int
		err := syscall.Pipe(ends[:])
		t.Cleanup(func() { syscall.Close(ends[1]) })
		return os.NewFile(uintptr(ends[0]), "pipe"), err
	}},
	{"regular file", func(t *testing.T) (shareable, error) {
		return os.CreateTemp(t.TempDir(), "")
	}},
	{"terminal", func(*testing.T) (shareable, error) {
		return os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	}},
	{"blocking terminal", func(*testing.T) (shareable, error) {
		fd, err := syscall.Open("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
		return os.NewFile(uintptr(fd), "terminal"), err
	}},
}

// pass adds a shareable to the registry.
func pass(upg *tableflip.Upgrader, name string, s shareable) error {
	switch s := s.(type) {
	case *os.File:
		return upg.AddFile(name, s)
	case tableflip.Listener:
		return upg.AddListener("test", name, s)
	case *net.TCPConn:
		return upg.AddConn("test", name, s)
	case tableflip.PacketConn:
		return upg.AddPacketConn("test", name, s)
	}
	return fmt.Errorf("%T is not shareable", s)
}

// claim takes the shareable that pass has added.
func claim(upg *tableflip.Upgrader, name string) shareable {
	if ln := must(upg.Listener("test", name)); ln != nil {
		return ln.(shareable)
	}
	if conn := must(upg.PacketConn("test", name)); conn != nil {
		return conn.(shareable)
	}
	if conn := must(upg.Conn("test", name)); conn != nil {
		return conn.(shareable)
	}
	return must(upg.File(name))
}

// statusFlags returns what belongs to the open file that processes share, of
// which O_NONBLOCK is a part.
func statusFlags(c syscall.Conn) (flags int) {
	raw := must(c.SyscallConn())
	if err := raw.Control(func(fd uintptr) {
		flags = must(unix.FcntlInt(fd, syscall.F_GETFL, 0))
	}); err != nil {
		panic(err)
	}
	return flags
}

func shortDir(t *testing.T) string {
	t.Helper()
	// Not t.TempDir: the path of a Unix socket must be short.
	dir, err := os.MkdirTemp("", "chain")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

const failVariable = "TABLEFLIP_TEST_FAIL"

func init() {
	// hold claims all shareables, and holds them until the end of the test.
	roles["hold"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		held := map[string]shareable{}
		flags := map[string]int{}
		for _, s := range shareables {
			held[s.name] = claim(upg, s.name)
			flags[s.name] = statusFlags(held[s.name])
		}
		report("flags", fmt.Sprint(flags))
		if os.Getenv(failVariable) != "" {
			os.Exit(7)
		}
		if err := upg.Ready(); err != nil {
			panic(err)
		}
		report("ready")
		select {}
	}
	roles["exit"] = func() { os.Exit(7) }
	// take claims a listener, and does not accept from it.
	roles["take"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		must(upg.Listener("test", "listener"))
		if os.Getenv(failVariable) != "" {
			os.Exit(7)
		}
		if err := upg.Ready(); err != nil {
			panic(err)
		}
		report("ready")
		select {}
	}
}

// TestUpgradeLeavesFlags checks that an upgrade, failed or not, changes the
// blocking mode of nothing that is passed on, nor any other status flag.
func TestUpgradeLeavesFlags(t *testing.T) {
	env := []string{failVariable + "=1"}
	input, inputWriter, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer inputWriter.Close()
	defer input.Close()
	upg, s := newParent(t, tableflip.Options{
		Command: func(cmd *exec.Cmd) { cmd.Stdin = input },
	}, "hold", env...)

	passed := map[string]shareable{}
	flags := func() string {
		flags := map[string]int{}
		for name, s := range passed {
			flags[name] = statusFlags(s)
		}
		return fmt.Sprint(flags)
	}
	for _, s := range shareables {
		c, err := s.open(t)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		passed[s.name] = c
	}
	want := flags()
	inputFlags, outputFlags := statusFlags(input), statusFlags(s.output)
	expect := func(when string) {
		t.Helper()
		if got := flags(); got != want {
			t.Errorf("%s the flags are %s; they were %s", when, got, want)
		}
		if got := statusFlags(input); got != inputFlags {
			t.Errorf("%s the flags of the standard input are %#x; they were %#x", when, got, inputFlags)
		}
		if got := statusFlags(s.output); got != outputFlags {
			t.Errorf("%s the flags of the standard output are %#x; they were %#x", when, got, outputFlags)
		}
	}

	for name, s := range passed {
		if err := pass(upg, name, s); err != nil {
			t.Fatal(err)
		}
	}
	expect("after adding")
	ready(t, upg)
	if err := upg.Upgrade(); err == nil {
		t.Fatal("the child did not fail")
	}
	expect("after a failed upgrade")
	if got := s.await("flags").text; got != want {
		t.Errorf("in the child that failed the flags are %s; they were %s", got, want)
	}

	env[0] = failVariable + "="
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	expect("after a successful upgrade")
	if got := s.await("flags").text; got != want {
		t.Errorf("in the child the flags are %s; they were %s", got, want)
	}
	s.await("ready")
	expect("when the child is in charge")
}

// TestParentAcceptsAndCloses checks that after an upgrade, failed or not, the
// parent's Accept still accepts, and its Close still wakes Accept up.
func TestParentAcceptsAndCloses(t *testing.T) {
	children := []struct {
		name     string
		role     string
		fail     string
		succeeds bool
	}{
		{"child exits", "exit", "", false},
		// Taking a listener makes it non-blocking, should it not be so.
		{"child takes the listener and exits", "take", "1", false},
		{"child takes the listener and the charge", "take", "", true},
	}
	for _, child := range children {
		for _, network := range []string{"tcp", "unix"} {
			t.Run(child.name+"/"+network, func(t *testing.T) {
				upg, s := newParent(t, tableflip.Options{}, child.role, failVariable+"="+child.fail)
				addr := "127.0.0.1:0"
				if network == "unix" {
					addr = filepath.Join(shortDir(t), "socket")
				}
				ln, err := net.Listen(network, addr)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { ln.Close() })
				if err := upg.AddListener("test", "listener", ln.(tableflip.Listener)); err != nil {
					t.Fatal(err)
				}
				accepted := make(chan error, 10)
				go func() {
					for {
						conn, err := ln.Accept()
						accepted <- err
						if err != nil {
							return
						}
						conn.Close()
					}
				}()

				ready(t, upg)
				if err := upg.Upgrade(); (err == nil) != child.succeeds {
					t.Fatal(err)
				}
				if child.succeeds {
					s.await("ready")
				}
				// After the first, Accept asks the kernel again.
				for range 2 {
					conn, err := net.DialTimeout(network, ln.Addr().String(), patience)
					if err != nil {
						t.Fatal(err)
					}
					defer conn.Close()
					expectSoon(t, "Accept", accepted, nil)
				}
				closed := make(chan error, 1)
				go func() { closed <- ln.Close() }()
				expectSoon(t, "Close", closed, nil)
				expectSoon(t, "Accept after Close", accepted, net.ErrClosed)
			})
		}
	}
}

func expectSoon(t *testing.T, what string, result <-chan error, want error) {
	t.Helper()
	select {
	case err := <-result:
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", what, err, want)
		}
	case <-time.After(patience):
		t.Fatalf("%s hangs", what)
	}
}
