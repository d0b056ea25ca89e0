//go:build unix

package link_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/link"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// Links between the processes of a real service, and what happens to them when one of
// these dies, hangs or gives up.

const (
	strangerVariable = "LINKTEST_STRANGER" // set for a version that does not know links, of this process only
	mishapVariable   = "LINKTEST_MISHAP"   // what happens to this process before Ready
)

// The steps of a generation beside those of the handover.
var (
	beforeJoin   = step.New("before Join")
	joined       = step.New("joined")
	readyReturns = step.New("Ready has returned")
)

func init() {
	// generation says hello to the one before it, and obeys until it is ordered to end.
	proctest.Role("generation", func() {
		w := proctest.OpenWire()
		stranger := proctest.Take(strangerVariable) != ""
		mishap := proctest.Take(mishapVariable)
		var childEnv []string
		upg := proctest.Must(tableflip.New(tableflip.Options{
			UpgradeTimeout: proctest.Patience,
			Command:        func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, childEnv...) },
		}))
		step.Reached(beforeJoin)
		var m *link.Meeting
		if !stranger {
			m = proctest.Must(link.Join(upg, "talk"))
			for _, l := range m.Older() {
				if err := l.Send(context.Background(), hello(os.Getpid())); err != nil {
					w.ReportError("not greeted", err)
				}
			}
		}
		step.Reached(joined)
		switch mishap {
		case "exit":
			os.Exit(7)
		case "stop and exit":
			upg.Stop()
			os.Exit(7)
		case "hang":
			w.Hang()
		case "suspend":
			w.Report("hanging")
			syscall.Kill(os.Getpid(), syscall.SIGSTOP)
			select {}
		case "start a process":
			holder := exec.Command("sleep", "1000")
			proctest.Must(0, holder.Start())
			w.Report("started", holder.Process.Pid)
			w.Hang()
		}
		if err := upg.Ready(); err != nil {
			w.ReportError("refused", err)
			os.Exit(2)
		}
		step.Reached(readyReturns)

		children := make(chan *link.Link, 10)
		older := 0
		if m != nil {
			older = len(m.Older())
			for _, l := range m.Older() {
				go hear(w, l)
			}
			go acceptAll(w, m, children)
		}
		w.Report("serving", older)
		for o := range w.Orders() {
			switch o.Do {
			case "upgrade":
				childEnv = o.Arguments
				go func() { w.ReportError("upgraded", upg.Upgrade()) }()
			case "say": // to the child that greeted last
				w.ReportError("said", (<-children).Send(context.Background(), []byte(o.Arguments[0]), os.Stdout))
			case "flood": // until the child's buffer is full
				ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
				l := <-children
				var err error
				for err == nil {
					err = l.Send(ctx, make([]byte, 100_000))
				}
				cancel()
				w.ReportError("flooded", err)
			case "wait":
				w.ReportError("alone", upg.WaitForParent(context.Background()))
			case "end":
				os.Exit(0)
			}
		}
	})
}

func hello(pid int) []byte { return fmt.Append(nil, "hello from ", pid) }

// acceptAll reports who greets, and passes those on that live.
func acceptAll(w *proctest.Wire, m *link.Meeting, children chan<- *link.Link) {
	for {
		l, err := m.Accept(context.Background())
		if err != nil {
			w.ReportError("accepted all", err)
			return
		}
		children <- l
		text, _, err := l.Receive(context.Background())
		if err != nil {
			panic(err)
		}
		w.Report("greeted", string(text))
	}
}

// hear reports what an older generation says.
func hear(w *proctest.Wire, l *link.Link) {
	for {
		text, files, err := l.Receive(context.Background())
		if err != nil {
			w.ReportError("older ended", err)
			return
		}
		w.Report("heard", string(text), len(files))
		closeFiles(files)
	}
}

// startParent makes the test itself the first generation. env is for the next child.
func startParent(t *testing.T) (upg *tableflip.Upgrader, m *link.Meeting, s *proctest.Service, env *[]string) {
	t.Helper()
	s, env = proctest.NewService(t), new([]string)
	upg, err := tableflip.New(tableflip.Options{
		UpgradeTimeout: proctest.Patience,
		Command:        func(cmd *exec.Cmd) { s.Prepare(cmd, "generation", append(*env, s.Wire())...) },
	})
	proctest.OK(t, err)
	t.Cleanup(upg.Stop)
	m = proctest.Opened[*link.Meeting](t)(link.Join(upg, "talk"))
	proctest.OK(t, upg.Ready())
	return upg, m, s, env
}

// deaths are how a child that does not take charge ends.
var deaths = []struct {
	name    string
	fault   step.Step // at which it kills itself
	mishap  string    // or what else happens to it
	joins   bool      // before that
	lingers bool      // until the upgrade is cancelled
}{
	{name: "before it joins", fault: beforeJoin},
	{name: "after it has joined", fault: joined, joins: true},
	{name: "after it said ready", fault: step.ReadySaid, joins: true},
	{name: "after the commit", fault: step.VerdictReceived, joins: true},
	{name: "exit", mishap: "exit", joins: true},
	{name: "stop", mishap: "stop and exit", joins: true},
	{name: "hang", mishap: "hang", joins: true, lingers: true},
	{name: "suspension", mishap: "suspend", joins: true, lingers: true},
	{name: "a process that it has started lives on", mishap: "start a process", joins: true, lingers: true},
}

// TestChildDies checks that whatever happens to a child, the parent's end of their link
// ends, and the next child finds the parent.
func TestChildDies(t *testing.T) {
	for _, accepts := range []bool{true, false} {
		t.Run("accepted at once: "+strconv.FormatBool(accepts), func(t *testing.T) {
			upg, m, s, env := startParent(t)
			proctest.WithoutGC(t)
			descriptors := 0
			for _, d := range deaths {
				*env = []string{s.DieAt(d.fault), mishapVariable + "=" + d.mishap}
				failToUpgrade(t, upg, s, d.mishap, d.lingers)
				if d.joins && accepts {
					l := proctest.Opened[*link.Link](t)(m.Accept(patience(t)))
					if got, _, err := l.Receive(patience(t)); !strings.HasPrefix(string(got), "hello") {
						t.Errorf("%s: received %q, %v", d.name, got, err)
					}
					wantReceiveError(t, l, io.EOF)
					if err := l.Send(t.Context(), []byte("nobody")); err != io.EOF {
						t.Errorf("%s: Send returned %v", d.name, err)
					}
					l.Close()
				}
				if now := proctest.OpenDescriptors(); descriptors == 0 || !accepts && now == descriptors+1 {
					descriptors = now // with the claim that nobody accepts
				} else if now > descriptors {
					t.Errorf("%s: %d descriptors are open, and were %d", d.name, now, descriptors)
				}
			}

			*env = nil
			proctest.OK(t, upg.Upgrade())
			child := s.Next()
			child.Take("serving")
			wantConversation(t, m, child)
			proctest.WantError(t, "Accept", proctest.ErrorOf(m.Accept(patience(t))), io.EOF)
		})
	}
}

// failToUpgrade has a child fail, which the caller has told how.
func failToUpgrade(t *testing.T, upg *tableflip.Upgrader, s *proctest.Service, mishap string, lingers bool) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	upgraded := proctest.InBackground(func() error { return upg.UpgradeContext(ctx) })
	child := s.Next()
	if mishap == "start a process" {
		pid, err := strconv.Atoi(child.Take("started").Text)
		proctest.OK(t, err)
		s.Watch(pid)
	}
	if lingers {
		if mishap != "start a process" {
			child.Take("hanging")
		}
		cancel()
	}
	if err := proctest.Within(t, "Upgrade", upgraded); err == nil {
		t.Fatal("the upgrade has succeeded")
	}
	child.AwaitEnd()
}

// wantConversation checks that the newest child's link, perhaps behind those of the
// dead, leads to child.
func wantConversation(t *testing.T, m *link.Meeting, child *proctest.Process) {
	t.Helper()
	for {
		l := proctest.Opened[*link.Link](t)(m.Accept(patience(t)))
		got, _, err := l.Receive(patience(t))
		proctest.OK(t, err)
		if string(got) != string(hello(child.PID)) {
			wantReceiveError(t, l, io.EOF)
			continue
		}
		proctest.OK(t, l.Send(t.Context(), []byte("2 connections left"), os.Stderr))
		if got := child.Take("heard").Text; got != "2 connections left 1" {
			t.Errorf("the child has heard %q", got)
		}
		child.Order("end")
		wantReceiveError(t, l, io.EOF)
		return
	}
}

// A child that dies in charge ends its link, as any other.
func TestChildDiesInCharge(t *testing.T) {
	for _, fault := range []step.Step{step.Acknowledged, readyReturns} {
		upg, m, s, env := startParent(t)
		*env = []string{s.DieAt(fault)}
		proctest.OK(t, upg.Upgrade())
		l := proctest.Opened[*link.Link](t)(m.Accept(patience(t)))
		child := s.Next()
		wantMessage(t, l, string(hello(child.PID)))
		wantReceiveError(t, l, io.EOF)
		upg.Stop()
	}
}

// startChain starts a first generation that is a process of its own.
func startChain(t *testing.T, env ...string) (*proctest.Service, *proctest.Process) {
	t.Helper()
	s := proctest.NewService(t)
	s.Start(s.Command("generation", append(env, s.Wire())...))
	g := s.Next()
	wantServing(t, g, 0)
	return s, g
}

func wantServing(t *testing.T, g *proctest.Process, older int) {
	t.Helper()
	if got := g.Take("serving").Text; got != strconv.Itoa(older) {
		t.Errorf("%d has links to %s older generations, want %d", g.PID, got, older)
	}
}

// upgrade has g replaced by a generation with env, which it returns.
func upgrade(t *testing.T, s *proctest.Service, g *proctest.Process, env ...string) *proctest.Process {
	t.Helper()
	g.Order("upgrade", env...)
	if m := g.Take("upgraded"); m.Text != "" {
		t.Fatal(m.Text)
	}
	return s.Next()
}

// TestChain checks that each generation hears its predecessor while that drains.
func TestChain(t *testing.T) {
	s, g := startChain(t)
	for range 5 {
		next := upgrade(t, s, g)
		wantServing(t, next, 1)
		if got := g.Take("greeted").Text; got != string(hello(next.PID)) {
			t.Errorf("%d was greeted by %q", g.PID, got)
		}
		g.Order("say", "3 connections left")
		if got := next.Take("heard").Text; got != "3 connections left 1" {
			t.Errorf("%d has heard %q", next.PID, got)
		}
		end(t, g, next)
		g = next
	}
}

// end ends a generation that drains.
func end(t *testing.T, g, next *proctest.Process) {
	t.Helper()
	g.Order("end")
	if got := next.Take("older ended").Text; got != io.EOF.Error() {
		t.Errorf("the link to %d has ended by %q", g.PID, got)
	}
	await(t, next)
}

// await waits until next has no parent any more.
func await(t *testing.T, next *proctest.Process) {
	t.Helper()
	next.Order("wait")
	if m := next.Take("alone"); m.Text != "" {
		t.Error(m.Text)
	}
}

// A version that does not know links has none, and the next that does begins anew.
func TestVersions(t *testing.T) {
	const stranger = strangerVariable + "=yes"
	s, g := startChain(t)
	strange := upgrade(t, s, g, stranger)
	wantServing(t, strange, 0)
	if got := g.Take("accepted all").Text; got != io.EOF.Error() {
		t.Errorf("when nobody can join, Accept has returned %q", got)
	}
	g.Order("end")
	await(t, strange)

	linked := upgrade(t, s, strange)
	wantServing(t, linked, 0)
	strange.Order("end")
	await(t, linked)

	last := upgrade(t, s, linked)
	wantServing(t, last, 1)
	linked.Take("greeted")
	end(t, linked, last)
}

// A parent that dies undecided leaves a child in charge whose link has ended, and who
// meets its own child.
func TestParentDies(t *testing.T) {
	for _, fault := range []step.Step{step.ChildStarted, step.ReadyReceived, step.BeforeCommit, step.AfterCommit} {
		s := proctest.NewService(t)
		s.Start(s.Command("generation", s.Wire(), s.DieAt(fault)))
		parent := s.Next()
		wantServing(t, parent, 0)
		parent.Order("upgrade")
		child := s.Next()
		wantServing(t, child, 1)
		parent.AwaitEnd()
		if got := child.Take("older ended").Text; got != io.EOF.Error() {
			t.Errorf("the link has ended by %q", got)
		}
		await(t, child)
		next := upgrade(t, s, child)
		wantServing(t, next, 1)
		child.Take("greeted")
		end(t, child, next)
	}
}

// A parent that is suspended does not hold up its child's Join.
func TestParentIsSuspended(t *testing.T) {
	s, parent := startChain(t)
	parent.Order("upgrade", s.PauseAt(beforeJoin))
	child := s.Next()
	child.AwaitStep(beforeJoin)
	proctest.Suspend(t, parent.PID)
	child.Resume()
	child.AwaitStep(joined)
	proctest.Continue(t, parent.PID)
	wantServing(t, child, 1)
	parent.Take("greeted")
	parent.Order("say", "still here")
	child.Take("heard")
	end(t, parent, child)
}

// A child that is suspended does not hold up its parent, whatever that has to say.
func TestChildIsSuspended(t *testing.T) {
	s, parent := startChain(t)
	child := upgrade(t, s, parent)
	wantServing(t, child, 1)
	parent.Take("greeted")
	proctest.Suspend(t, child.PID)
	parent.Order("flood")
	if got := parent.Take("flooded").Text; got != context.DeadlineExceeded.Error() {
		t.Errorf("Send returned %q", got)
	}
	proctest.Continue(t, child.PID)
	// The last message is cut, unless the buffer was full at the end of one.
	parent.Order("end")
	if got := child.Take("older ended").Text; !strings.HasSuffix(got, io.EOF.Error()) {
		t.Errorf("the link has ended by %q", got)
	}
}

// After Stop, nobody joins, and New may begin anew.
func TestStop(t *testing.T) {
	upg, m, _, _ := startParent(t)
	accepted := proctest.InBackground(func() error { return proctest.ErrorOf(m.Accept(context.Background())) })
	upg.Stop()
	proctest.WantError(t, "Accept", proctest.Within(t, "Accept", accepted), io.EOF)
	if _, err := link.Join(upg, "talk"); !errors.Is(err, tableflip.ErrStopped) {
		t.Errorf("Join returned %v", err)
	}
}
