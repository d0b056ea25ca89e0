//go:build unix

package control_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/control"
	"example.com/tableflip/internal/proctest"
	stub "example.com/tableflip/testing"
)

// shortPatience is what a service has for what never comes.
const shortPatience = time.Second

func TestMain(m *testing.M) {
	// A process that is suspended here loses nothing.
	control.SetPatience(2 * proctest.Patience)
	proctest.Main(m)
}

func init() {
	proctest.Role("serve", serveRole)
	proctest.Role("ctl", func() { os.Exit(control.Main(os.Args[2:]...)) })
}

const (
	maxDraining = "CONTROLTEST_MAXDRAINING" // the variable for Options.MaxDraining
	impatient   = "CONTROLTEST_IMPATIENT"   // the variable for a service with shortPatience, if not empty
)

// serveRole is a service whose Arg is a directory. There it finds how it is to behave,
// and there is its control socket. It has no other, and drains until it is told that it
// has drained, if it is to.
func serveRole() {
	wire := proctest.OpenWire()
	directory := proctest.Arg()
	switch flaw(directory) {
	case "exit":
		os.Exit(7)
	case "hang":
		wire.Hang()
	}
	if os.Getenv(impatient) != "" {
		control.SetPatience(shortPatience)
	}
	limit, _ := strconv.Atoi(os.Getenv(maxDraining))
	upg := proctest.Must(tableflip.New(tableflip.Options{MaxDraining: limit, UpgradeTimeout: proctest.Patience}))
	defer upg.Stop()
	ctl := proctest.Must(control.New(upg, filepath.Join(directory, "ctl"), control.Options{
		Connections: func() int { return 3 },
		Cut:         func() int { return 2 },
	}))
	if flaw(directory) == "refuse" {
		os.Exit(7)
	}
	if err := upg.Ready(); err != nil {
		return
	}
	go ctl.Serve()
	wire.Report("in charge")

	drained := make(chan struct{})
	go func() {
		for order := range wire.Orders() {
			switch order.Do {
			case "upgrade":
				if err := upg.Upgrade(); err != nil {
					panic(err)
				}
			case "drained":
				close(drained)
			}
		}
	}()
	<-upg.Exit()
	if flaw(directory) == "drain" {
		<-drained
	}
	ctl.Close()
	wire.Report("closed")
}

// flaw returns what is wrong with the generations that are started from now on, or with
// the end of this one.
func flaw(directory string) string {
	content, _ := os.ReadFile(filepath.Join(directory, "flaw"))
	return string(content)
}

// A service is a chain of generations with a control socket.
type service struct {
	*proctest.Service
	t         *testing.T
	directory string
	socket    string
	current   *proctest.Process // which is in charge
}

func start(t *testing.T, env ...string) *service {
	t.Helper()
	directory := proctest.SocketDir(t)
	s := &service{proctest.NewService(t), t, directory, filepath.Join(directory, "ctl"), nil}
	s.Start(s.Command("serve", append(env, s.Wire(), proctest.WithArg(directory))...))
	s.adopt()
	return s
}

// adopt waits for the next generation, and until it is in charge.
func (s *service) adopt() (old *proctest.Process) {
	s.t.Helper()
	old, s.current = s.current, s.Next()
	s.current.Await("in charge")
	return old
}

func (s *service) setFlaw(flaw string) {
	s.t.Helper()
	proctest.OK(s.t, os.WriteFile(filepath.Join(s.directory, "flaw"), []byte(flaw), 0o600))
}

// client connects to the service, whatever the address.
func (s *service) client() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.socket)
		},
	}}
}

// An answer is what the service has said.
type answer struct {
	code int
	text string
	err  error
}

func (s *service) ask(ctx context.Context, method, path string) answer {
	request, err := http.NewRequestWithContext(ctx, method, "http://control"+path, nil)
	if err != nil {
		return answer{err: err}
	}
	response, err := s.client().Do(request)
	if err != nil {
		return answer{err: err}
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	return answer{response.StatusCode, string(content), err}
}

// want checks the code of an answer, and that it has all these parts.
func (s *service) want(a answer, code int, parts ...string) {
	s.t.Helper()
	if a.err != nil || a.code != code {
		s.t.Errorf("answered %d %q, %v, want %d", a.code, a.text, a.err, code)
	}
	for _, part := range parts {
		if !strings.Contains(a.text, part) {
			s.t.Errorf("answered %q, want %q in it", a.text, part)
		}
	}
}

// A status is what the tests look at.
type status struct {
	PID         int
	Generation  int
	State       string
	Listeners   []string
	Connections int
	Others      []struct{ PID, Generation, Connections int }
	LastUpgrade *struct {
		PID   int
		Error string
	}
	Counters control.Counters
}

func (s *service) status() status {
	s.t.Helper()
	a := s.ask(s.t.Context(), http.MethodGet, "/status?json")
	s.want(a, http.StatusOK)
	var st status
	proctest.OK(s.t, json.Unmarshal([]byte(a.text), &st))
	return st
}

// wantInCharge checks that the current process serves.
func (s *service) wantInCharge() {
	s.t.Helper()
	if st := s.status(); st.PID != s.current.PID || st.State != "in charge" {
		s.t.Errorf("process %d is %s, want %d in charge", st.PID, st.State, s.current.PID)
	}
}

// A ctl is the command, which runs.
type ctl struct {
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
	ended          <-chan struct{}
}

func (s *service) ctl(arguments ...string) *ctl {
	s.t.Helper()
	c := s.prepareCtl(arguments...)
	c.ended = s.Start(c.cmd)
	return c
}

func (s *service) prepareCtl(arguments ...string) *ctl {
	c := &ctl{cmd: exec.Command(os.Args[0])}
	c.cmd.Args = proctest.Arguments("ctl", append([]string{"-s", s.socket}, arguments...)...)
	c.cmd.Stdout, c.cmd.Stderr = &c.stdout, &c.stderr
	return c
}

// wantExit checks how the command ends, and that it says all of says.
func (s *service) wantExit(c *ctl, status int, says ...string) {
	s.t.Helper()
	proctest.Within(s.t, "the end of the command", c.ended)
	if got := c.cmd.ProcessState.ExitCode(); got != status {
		s.t.Errorf("%v ended with status %d, %q, %q, want %d", c.cmd.Args, got, &c.stdout, &c.stderr, status)
	}
	text, other := &c.stderr, &c.stdout
	if status == 0 {
		text, other = other, text
	}
	for _, part := range says {
		if !strings.Contains(text.String(), part) {
			s.t.Errorf("%v said %q, want %q in it", c.cmd.Args, text, part)
		}
	}
	if other.Len() > 0 {
		s.t.Errorf("%v said %q", c.cmd.Args, other)
	}
}

func TestStatus(t *testing.T) {
	s := start(t)
	s.want(s.ask(t.Context(), http.MethodGet, "/status"), http.StatusOK,
		fmt.Sprintf("process %d, generation 1, is in charge since 20", s.current.PID),
		", and has 3 connections\n", "listens on unix "+s.socket+"\n", "an upgrade keeps the arguments, environment, limits")
	s.wantExit(s.ctl("status"), 0, "generation 1")
	s.wantExit(s.ctl("-json", "status"), 0, `"state":"in charge"`)
	st := s.status()
	if st.LastUpgrade != nil || st.Generation != 1 || st.Connections != 3 || !slices.Equal(st.Listeners, []string{"unix " + s.socket}) {
		t.Errorf("got %+v", st)
	}
	s.want(s.ask(t.Context(), http.MethodGet, "/upgrade"), http.StatusMethodNotAllowed)
	for header, kind := range map[string]string{"Accept: application/json, */*": "Content-Type: application/json\r\n", "Accept: */*": "Content-Type: text/plain"} {
		conn := proctest.Opened[net.Conn](t)(net.Dial("unix", s.socket))
		fmt.Fprintf(conn, "GET /status HTTP/1.1\r\nHost: control\r\n%s\r\n\r\n", header)
		// It is not kept open.
		if got := proctest.Answers(t, []net.Conn{conn})[0]; !strings.Contains(got, kind) {
			t.Errorf("to %q: answered %q, want %q in it", header, got, kind)
		}
	}
	s.want(s.ask(t.Context(), http.MethodGet, "/other"), http.StatusNotFound)

	s.setFlaw("drain")
	s.want(s.ask(t.Context(), http.MethodPost, "/upgrade?json"), http.StatusOK, `"pid":`, `"took":`)
	old := s.adopt()
	s.want(s.ask(t.Context(), http.MethodGet, "/status"), http.StatusOK,
		fmt.Sprintf("process %d, generation 1, is draining since", old.PID), fmt.Sprintf("the last upgrade put process %d in charge at ", s.current.PID))
	s.want(s.ask(t.Context(), http.MethodPost, "/upgrade?json"), http.StatusConflict, `{"error":"refused for now: the process before this one drains"}`)
	s.wantExit(s.ctl("sing"), 1, "usage")
	old.Order("drained")
	old.AwaitEnd()
}

func TestUpgrade(t *testing.T) {
	s := start(t)
	// The old process ends at once, and yet its answer arrives.
	for range 3 {
		a := s.ask(t.Context(), http.MethodPost, "/upgrade?wait")
		old := s.adopt()
		s.want(a, http.StatusOK, fmt.Sprintf("process %d has taken over from %d", s.current.PID, old.PID))
		s.wantInCharge()
		old.AwaitEnd()
	}
	st := s.status()
	if st.LastUpgrade == nil || st.LastUpgrade.PID != s.current.PID || st.LastUpgrade.Error != "" {
		t.Errorf("got %+v", st)
	}
}

// What was counted outlives the generations that have counted it.
func TestCounters(t *testing.T) {
	s := start(t)
	for range 3 {
		s.setFlaw("exit")
		s.want(s.ask(t.Context(), http.MethodPost, "/upgrade?wait"), http.StatusInternalServerError)
		s.Next()
		s.setFlaw("drain")
		s.want(s.ask(t.Context(), http.MethodPost, "/upgrade?wait"), http.StatusOK)
		old := s.adopt()
		proctest.AwaitThat(t, "the status knows how the old process drains", func() bool {
			others := s.status().Others
			return len(others) == 1 && others[0].PID == old.PID && others[0].Connections == 3
		})
		s.setFlaw("")
		old.Order("drained")
		old.AwaitEnd()
	}
	proctest.AwaitThat(t, "the last process to have ended is counted", func() bool { return s.status().Counters.Drains == 3 && s.status().Counters.ConnectionsCut == 6 })
	st := s.status()
	if st.Counters.Upgrades != 3 || st.Counters.Failures["child"] != 3 || st.Counters.DrainSeconds <= 0 || len(st.Others) != 0 {
		t.Errorf("got %+v", st)
	}
}

// Whoever is in charge knows of all that drain, in whatever order they end.
func TestManyDrain(t *testing.T) {
	s := start(t, maxDraining+"=2")
	s.setFlaw("drain")
	var drain []*proctest.Process
	upgrade := func() {
		t.Helper()
		s.want(s.ask(t.Context(), http.MethodPost, "/upgrade?wait"), http.StatusOK)
		drain = append(drain, s.adopt())
	}
	end := func(i int) {
		t.Helper()
		drain[i].Order("drained")
		drain[i].AwaitEnd()
		drain = slices.Delete(drain, i, i+1)
	}
	wantDraining := func() {
		t.Helper()
		var others []int
		for _, p := range drain {
			others = append(others, p.PID)
		}
		proctest.AwaitThat(t, fmt.Sprint("the status knows of ", others), func() bool {
			var known []int
			for _, other := range s.status().Others {
				if other.Connections == 3 {
					known = append(known, other.PID)
				}
			}
			return slices.Equal(known, others)
		})
	}
	for range 3 {
		upgrade()
		wantDraining()
	}
	end(1)
	wantDraining()
	upgrade()
	wantDraining()

	waits := s.ctl("-wait", "upgrade")
	end(0)
	s.wantExit(waits, 0, "has taken over")
	drain = append(drain, s.adopt())
	wantDraining()
	for len(drain) > 0 {
		end(len(drain) / 2)
	}
	proctest.AwaitThat(t, "all that have drained are counted", func() bool {
		c := s.status().Counters
		return c.Drains == 5 && c.ConnectionsCut == 10
	})
}

// What failed children have claimed is closed.
func TestUpgradeFailsClosed(t *testing.T) {
	s := start(t)
	s.setFlaw("refuse")
	fail := func() {
		t.Helper()
		s.want(s.ask(t.Context(), http.MethodPost, "/upgrade"), http.StatusInternalServerError)
		s.Next().AwaitEnd()
	}
	fail()
	before := len(proctest.OpenFiles(t, s.current.PID))
	for range 5 {
		fail()
	}
	proctest.AwaitThat(t, "no more is open than after the first", func() bool { return len(proctest.OpenFiles(t, s.current.PID)) <= before })
}

// A crowded Upgrader finds no place for a while.
type crowded struct {
	*stub.Upgrader
	attempts int
}

func (u *crowded) UpgradeContext(context.Context) error {
	if u.attempts++; u.attempts < 3 {
		return fmt.Errorf("%w: %w", tableflip.ErrParentRunning, os.ErrDeadlineExceeded)
	}
	return nil
}

func (u *crowded) WaitForParent(ctx context.Context) error {
	panic("an upgrade waits for all earlier generations")
}

// Who waits for an upgrade goes on to wait for a place.
func TestUpgradeWaitsAgain(t *testing.T) {
	upg := &crowded{Upgrader: proctest.Must(stub.New())}
	directory := proctest.SocketDir(t)
	s := &service{proctest.NewService(t), t, directory, filepath.Join(directory, "ctl"), nil}
	ctl := proctest.Must(control.New(upg, s.socket, control.Options{}))
	defer ctl.Close()
	go ctl.Serve()
	s.want(s.ask(t.Context(), http.MethodPost, "/upgrade"), http.StatusConflict, tableflip.ErrParentRunning.Error())
	s.want(s.ask(t.Context(), http.MethodPost, "/upgrade?wait"), http.StatusOK)
}

// A generation that is suspended while another ends holds it up no longer than Close may.
func TestCountersSuspended(t *testing.T) {
	s := start(t)
	s.setFlaw("drain")
	s.want(s.ask(t.Context(), http.MethodPost, "/upgrade"), http.StatusOK)
	old := s.adopt()
	proctest.Suspend(t, s.current.PID)
	old.Order("drained")
	old.AwaitEnd()
	proctest.Continue(t, s.current.PID)
	proctest.AwaitThat(t, "what it has reported was heard", func() bool { return s.status().Counters.ConnectionsCut == 2 })
}

func TestUpgradeFails(t *testing.T) {
	s := start(t)
	s.setFlaw("exit")
	a := s.ask(t.Context(), http.MethodPost, "/upgrade")
	failed := s.Next()
	s.want(a, http.StatusInternalServerError, fmt.Sprint(failed.PID))
	s.wantInCharge()
	if st := s.status(); st.LastUpgrade == nil || st.LastUpgrade.PID != failed.PID || st.LastUpgrade.Error == "" || st.Counters.Failures["child"] != 1 {
		t.Errorf("got %+v", st)
	}
	s.wantExit(s.ctl("upgrade"), 1, "exit status 7")

	s.setFlaw("")
	s.wantExit(s.ctl("-wait", "upgrade"), 0, "has taken over")
}

func TestRehearse(t *testing.T) {
	s := start(t)
	s.want(s.ask(t.Context(), http.MethodPost, "/rehearse"), http.StatusOK, "an upgrade would succeed")
	s.Next().AwaitEnd()
	s.setFlaw("exit")
	s.wantExit(s.ctl("rehearse"), 1, "exit status 7")
	s.Next().AwaitEnd()
	s.wantInCharge()
	if st := s.status(); st.LastUpgrade != nil || len(st.Counters.Failures) != 0 {
		t.Errorf("a rehearsal was counted: %+v", st)
	}
	s.setFlaw("")
	waits := s.ctl("-wait", "rehearse")
	s.wantExit(waits, 0, "an upgrade would succeed")
	s.Next().AwaitEnd()
	s.wantExit(s.ctl("upgrade"), 0, "has taken over")
	s.adopt().AwaitEnd()
	s.wantInCharge()
	s.wantMode()
}

// Whoever asked goes away: the upgrade is aborted.
func TestUpgradeAborted(t *testing.T) {
	s := start(t)
	ctlThatIs := func(sig syscall.Signal, status int, says ...string) func() (abort func()) {
		return func() func() {
			c := s.ctl("upgrade")
			return func() {
				proctest.Kill(t, c.cmd.Process.Pid, sig)
				s.wantExit(c, status, says...)
			}
		}
	}
	for _, ask := range []func() (abort func()){
		ctlThatIs(syscall.SIGINT, 1, "interrupted: upgrade is aborted"),
		ctlThatIs(syscall.SIGKILL, -1),
		func() func() { // with a body
			conn := proctest.Opened[net.Conn](t)(net.Dial("unix", s.socket))
			io.WriteString(conn, "POST /upgrade HTTP/1.0\r\nContent-Length: 4\r\n\r\nbody")
			return func() { conn.Close() }
		},
	} {
		s.setFlaw("hang")
		abort := ask()
		child := s.Next()
		child.Await("hanging")
		abort()
		child.AwaitEnd()
		proctest.AwaitThat(t, "the service knows that it has failed", func() bool {
			last := s.status().LastUpgrade
			return last != nil && last.Error != ""
		})
		s.setFlaw("")
		s.want(s.ask(t.Context(), http.MethodPost, "/upgrade?wait"), http.StatusOK)
		s.adopt().AwaitEnd()
	}
}

func TestUpgradeTwoAtOnce(t *testing.T) {
	s := start(t)
	s.setFlaw("hang")
	first := s.ctl("upgrade")
	child := s.Next()
	child.Await("hanging")
	s.want(s.ask(t.Context(), http.MethodPost, "/upgrade"), http.StatusConflict, "another upgrade is under way")
	s.want(s.ask(t.Context(), http.MethodPost, "/rehearse"), http.StatusConflict, "another upgrade is under way")
	s.wantExit(s.ctl("upgrade"), 3, "another upgrade is under way")

	second := proctest.InBackground(func() answer { return s.ask(t.Context(), http.MethodPost, "/upgrade?wait") })
	s.setFlaw("")
	proctest.Kill(t, child.PID, syscall.SIGKILL)
	s.wantExit(first, 1, "killed")
	s.want(proctest.Within(t, "the second answer", second), http.StatusOK, "has taken over")
	s.adopt().AwaitEnd()
	s.wantInCharge()
}

// A process that was just replaced refuses, and its successor does not.
func TestCtlAsksAgain(t *testing.T) {
	s := &service{Service: proctest.NewService(t), t: t, socket: filepath.Join(proctest.SocketDir(t), "ctl")}
	ln := proctest.Opened[net.Listener](t)(net.Listen("unix", s.socket))
	codes := make(chan int, 4)
	go http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(<-codes)
		fmt.Fprintln(w, r.URL)
	}))
	for _, code := range []int{http.StatusConflict, http.StatusConflict, http.StatusOK, http.StatusConflict} {
		codes <- code
	}
	s.wantExit(s.ctl("-wait", "-json", "upgrade"), 0, "/upgrade?json=1&wait=1")
	s.wantExit(s.ctl("upgrade"), 3, "/upgrade?\n")
}

func TestUpgradeDuringDrain(t *testing.T) {
	s := start(t)
	s.setFlaw("drain")
	s.want(s.ask(t.Context(), http.MethodPost, "/upgrade"), http.StatusOK)
	old := s.adopt()
	s.want(s.ask(t.Context(), http.MethodPost, "/upgrade"), http.StatusConflict, "drains")
	s.wantExit(s.ctl("upgrade"), 3, "drains")
	output, _ := s.ctlOutput("events")
	output.Await("watching")
	waits := proctest.InBackground(func() answer { return s.ask(t.Context(), http.MethodPost, "/upgrade?wait") })
	output.Await("refused") // for the first time

	s.setFlaw("")
	old.Order("drained")
	s.want(proctest.Within(t, "the answer", waits), http.StatusOK, "has taken over")
	s.adopt()
	s.wantInCharge()
}
