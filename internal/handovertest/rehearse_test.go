//go:build unix

package handovertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// An upgrade that ends before the commit.

func init() {
	// rehearse does in the directory of its argument what a service does, and then WAY.
	proctest.Role("rehearse", func() {
		way, dir, _ := strings.Cut(proctest.Arg(), " ")
		upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: filepath.Join(dir, "pid")}))
		defer upg.Stop()
		proctest.Must(upg.Listen("unix", filepath.Join(dir, "socket")))
		proctest.Must(upg.Listen("unix", filepath.Join(dir, "new")))
		switch way {
		case "exits":
			upg.Stop()
			os.Exit(7)
		case "fails":
			upg.Fail(errors.New("no disk"))
			os.Exit(7)
		case "dies":
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		case "hangs":
			proctest.Report("hanging")
			proctest.UntilKilled()
		}
		err := upg.Ready()
		proctest.Report("refused", err, errors.Is(upg.WaitForParent(context.Background()), err))
		if way == "stays" {
			proctest.UntilKilled()
		}
	})
}

// A remain is what a rehearsal must leave as it was.
type remain struct {
	files       string // with inodes and times of change
	pid         string // what the PID file holds
	descriptors int
	children    int
}

func remains(t *testing.T, dir string) remain {
	t.Helper()
	r := remain{descriptors: proctest.OpenDescriptors()}
	for _, name := range []string{"pid", "socket"} {
		info, err := os.Stat(filepath.Join(dir, name))
		proctest.OK(t, err)
		r.files += fmt.Sprintf("%s %+v\n", name, info.Sys())
	}
	entries, err := os.ReadDir(dir)
	proctest.OK(t, err)
	for _, entry := range entries {
		r.files += entry.Name() + "\n"
	}
	content, err := os.ReadFile(filepath.Join(dir, "pid"))
	proctest.OK(t, err)
	r.pid = string(content)
	if runtime.GOOS == "linux" {
		r.children = len(proctest.ChildrenOf(os.Getpid()))
	}
	return r
}

func TestRehearse(t *testing.T) {
	for _, test := range []struct {
		way     string
		says    string // the error, which is nil if this is empty
		ready   bool
		litters bool // the child does not come to Stop, and leaves its own socket's file
		lingers bool // it does not exit by itself
	}{
		{way: "succeeds", ready: true},
		{way: "stays", ready: true, litters: true, lingers: true},
		{way: "exits", says: "exit status 7"},
		{way: "fails", says: "failed: no disk (exit status 7)"},
		{way: "dies", says: "signal: killed", litters: true},
		{way: "hangs", says: "cancelled", litters: true, lingers: true},
	} {
		t.Run(test.way, func(t *testing.T) {
			if test.lingers {
				shorten(t, &step.ExitGrace)
			}
			dir := proctest.SocketDir(t)
			upg, s := NewParent(t, tableflip.Options{PIDFile: filepath.Join(dir, "pid")},
				"rehearse", proctest.WithArg(test.way+" "+dir))
			proctest.OK(t, proctest.ErrorOf(upg.Listen("unix", filepath.Join(dir, "socket"))))
			proctest.OK(t, upg.Ready())
			proctest.WithoutGC(t)
			rehearse := func() {
				t.Helper()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				result := proctest.InBackground(func() error { return upg.Rehearse(ctx) })
				if test.way == "hangs" {
					s.Await("hanging")
					cancel()
				}
				err := proctest.Within(t, "Rehearse", result)
				if test.litters {
					if err := os.Remove(filepath.Join(dir, "new")); err != nil {
						t.Error(err)
					}
				}
				if test.says == "" && err != nil || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
					t.Errorf("Rehearse: %v, want %q", err, test.says)
				}
			}
			rehearse() // the first may open what stays
			before := remains(t, dir)
			events, cancel := event.Subscribe()
			defer cancel()
			rehearse()
			if after := remains(t, dir); after != before {
				t.Errorf("it has left\n%+v, and there was\n%+v", after, before)
			}
			if proctest.IsClosed(upg.Exit()) || len(upg.Generations()) != 1 {
				t.Error("the parent is not as it was")
			}
			if test.ready {
				if m := s.Await("refused"); !strings.Contains(m.Text, "rehearsed") || !strings.HasSuffix(m.Text, "true") {
					t.Errorf("Ready and WaitForParent: %s", m.Text)
				}
			}
			all := shownHere(events)
			last := all[len(all)-1]
			name := "rehearsed "
			if test.says != "" {
				name = "failed "
			}
			if !strings.HasPrefix(last, name) {
				t.Errorf("the events are %q", all)
			}
			for _, e := range all {
				if !strings.HasSuffix(e, " rehearsal=true") {
					t.Errorf("the event %q does not say that it is of a rehearsal", e)
				}
			}
			proctest.OK(t, upg.AddFile("a", os.Stderr)) // it would block if the registry was still frozen
		})
	}
}

// A child that fails while the parent looks whether all is ready is found out.
func TestRehearseFailsLate(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	upg, s := NewParent(t, tableflip.Options{}, "failing", proctest.WithArg("after plain "+path))
	proctest.OK(t, upg.Ready())
	proctest.During(t, step.ReadyReceived, func() { s.Await("failed") })
	if err := upg.Rehearse(t.Context()); err == nil || !strings.Contains(err.Error(), "failed: no disk") {
		t.Errorf("Rehearse: %v", err)
	}
}

// The states in which an upgrade is refused.
func TestRehearseRefused(t *testing.T) {
	shorten(t, &step.ExitGrace)
	upg, s := NewParent(t, tableflip.Options{}, "hang")
	proctest.WantError(t, "Rehearse", upg.Rehearse(t.Context()), tableflip.ErrNotReady)
	proctest.OK(t, upg.Ready())
	ended, end := context.WithCancel(t.Context())
	end()
	proctest.WantError(t, "Rehearse", upg.Rehearse(ended), context.Canceled)

	ctx, cancel := context.WithCancel(t.Context())
	result := proctest.InBackground(func() error { return upg.Rehearse(ctx) })
	s.Await("hanging")
	proctest.WantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrUpgradeInProgress)
	proctest.WantError(t, "Rehearse", upg.Rehearse(t.Context()), tableflip.ErrUpgradeInProgress)
	cancel()
	proctest.WantError(t, "Rehearse", proctest.Within(t, "Rehearse", result), context.Canceled)

	result = proctest.InBackground(func() error { return upg.Rehearse(t.Context()) })
	s.Await("hanging")
	upg.Stop()
	proctest.WantError(t, "Rehearse", proctest.Within(t, "Rehearse", result), tableflip.ErrStopped)
	proctest.WantError(t, "Rehearse", upg.Rehearse(t.Context()), tableflip.ErrStopped)
}

func TestRehearseParentRunning(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "rehearse-early")
	Upgrade(t, upg)
	if m := s.Await("rehearsed"); m.Text != tableflip.ErrParentRunning.Error() {
		t.Errorf("Rehearse: %s", m.Text)
	}
	proctest.WantError(t, "Rehearse", upg.Rehearse(t.Context()), tableflip.ErrUpgraded)
}

func init() {
	proctest.Role("rehearse-early", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		proctest.Report("rehearsed", upg.Rehearse(context.Background()))
	})
}

// Clients notice nothing of rehearsals.
func TestRehearseLoad(t *testing.T) {
	t.Parallel()
	c, g, _ := startChain(t, graceVariable+"=1s") // which passes where the child hangs
	for _, test := range []struct{ env, says string }{
		{"", ""},
		{mishapVariable + "=exit 7", "exit status 7"},
		{mishapVariable + "=hang", "cancelled"},
		{c.DieAt(newReturned), "signal: killed"},
		{"", ""},
	} {
		g.Order("rehearse", test.env)
		child := c.Next()
		for range 30 {
			c.wantAnswers(c.send(), g.PID)
		}
		if test.says == "cancelled" {
			child.Await("hanging")
			g.Order("cancel")
		}
		if m := g.Await("rehearsed"); test.says == "" && m.Text != "" || !strings.Contains(m.Text, test.says) {
			t.Errorf("Rehearse: %q, want %q", m.Text, test.says)
		}
		c.wantCharge(g.PID)
	}
	c.wantStop(c.upgrade(g))
}

// A service outlives the death of its process during a rehearsal, too.
func TestRehearseOrphan(t *testing.T) {
	t.Parallel()
	c := newChain(t)
	g, _ := c.start(c.DieAt(step.ReadyReceived))
	g.AwaitStep(alone)
	g.Order("rehearse")
	child := c.Next()
	g.AwaitEnd()
	child.AwaitStep(alone)
	c.wantCharge(child.PID)
	c.wantStop(child)
}

// A child that was told to leave, and has not, is no successor: if the process in charge
// dies before it has killed that child, those that drain must end soon.
func TestRehearseDrainingHurry(t *testing.T) {
	for _, way := range []string{"refused", "stopped"} {
		t.Run(way, func(t *testing.T) {
			upg, s := NewParent(t, tableflip.Options{}, "rehearse-draining", proctest.WithArg(way))
			Upgrade(t, upg)
			inCharge := s.Await("serving").PID
			s.Await("stays")
			proctest.Kill(t, inCharge, syscall.SIGKILL)
			proctest.Within(t, "Hurry", upg.Hurry())
		})
	}
}

func init() {
	// rehearse-draining rehearses beside its parent. Its child stays.
	proctest.Role("rehearse-draining", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{MaxDraining: 1}))
		if upg.Generations()[0].Number > 1 || len(upg.Generations()) > 2 {
			if proctest.Arg() == "stopped" {
				upg.Stop()
			} else if upg.Ready() == nil {
				panic("this is no rehearsal")
			}
			proctest.Report("stays")
			proctest.UntilKilled()
		}
		MustBeReady(upg)
		proctest.Report("serving")
		upg.Rehearse(context.Background())
		proctest.UntilKilled()
	})
}
