//go:build unix

package handovertest

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/queue"
)

// Several generations drain (Options.MaxDraining).

func init() {
	// draining tells who lives and whether it should hurry, and otherwise does what it is
	// told to.
	proctest.Role("draining", func() {
		limit := proctest.Must(strconv.Atoi(proctest.Arg()))
		var childEnv []string
		upg := proctest.Must(tableflip.New(tableflip.Options{
			MaxDraining: limit,
			Command:     func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, childEnv...) },
		}))
		asked := queue.Asked()
		if upg.Ready() != nil {
			return // this was a rehearsal
		}
		w := proctest.OpenWire()
		w.Report("ready")
		go func() {
			<-upg.Hurry()
			w.Report("hurry")
		}()
		go func() {
			for range asked {
				w.Report("asked")
			}
		}()
		alone := make(chan struct{})
		go func() {
			proctest.Must(0, upg.WaitForParent(context.Background()))
			close(alone)
			w.Report("alone")
		}()
		var ends []context.CancelCauseFunc // of the upgrades that were ordered
		endAll := func(cause error) {
			for _, end := range ends {
				end(cause)
			}
			ends = nil
		}
		for order := range w.Orders() {
			switch order.Do {
			case "look":
				text := lineage(upg)
				if proctest.IsClosed(upg.Hurry()) {
					text += ", hurries"
				}
				if proctest.IsClosed(alone) {
					text += ", alone"
				}
				w.Report("look", text)
			case "upgrade":
				timeout := proctest.Must(time.ParseDuration(order.Arguments[0]))
				childEnv = order.Arguments[1:]
				limited, cancel := context.WithTimeout(context.Background(), timeout)
				ctx, end := context.WithCancelCause(limited)
				ends = append(ends, end)
				go func() {
					defer cancel()
					w.ReportError("upgraded", upg.UpgradeContext(ctx))
				}()
			case "cancel":
				endAll(nil)
			case "expire":
				endAll(context.DeadlineExceeded)
			case "keep":
				queue.Keep()
			case "fork":
				w.Report("forked", keepPipes())
			case "add":
				w.ReportError("added", upg.AddFile("stderr", os.Stderr))
			case "rehearse":
				w.ReportError("rehearsed", upg.Rehearse(context.Background()))
			case "stop":
				upg.Stop()
				w.Report("stopped")
			case "exit":
				os.Exit(0)
			}
		}
	})
}

// A drainers is a service whose generations drain until they are told to end.
type drainers struct {
	*proctest.Service
	t       *testing.T
	all     []*proctest.Process
	ended   map[*proctest.Process]bool
	hurried map[*proctest.Process]bool
}

// startDraining starts a service in which limit generations may drain when an upgrade
// begins, and upgrades it n times.
func startDraining(t *testing.T, limit, n int, env ...string) *drainers {
	t.Helper()
	d := newDrainers(t)
	d.Start(d.command(limit, env...))
	d.add()
	for range n {
		d.upgrade()
	}
	return d
}

func newDrainers(t *testing.T) *drainers {
	return &drainers{
		Service: proctest.NewService(t),
		t:       t,
		ended:   map[*proctest.Process]bool{},
		hurried: map[*proctest.Process]bool{},
	}
}

// command starts a generation after which limit may drain when an upgrade begins.
func (d *drainers) command(limit int, env ...string) *exec.Cmd {
	return d.Command("draining", append(env, d.Wire(), proctest.WithArg(strconv.Itoa(limit)))...)
}

// add awaits the next process, until it is ready.
func (d *drainers) add() {
	d.t.Helper()
	p := d.Next()
	p.Await("ready")
	d.all = append(d.all, p)
}

// newest returns the process that was put in charge last.
func (d *drainers) newest() *proctest.Process { return d.all[len(d.all)-1] }

func (d *drainers) upgrade() {
	d.t.Helper()
	d.newest().Order("upgrade", "1m")
	d.wantUpgraded()
}

// wantUpgraded checks that the upgrade that was ordered puts a new process in charge.
func (d *drainers) wantUpgraded() {
	d.t.Helper()
	old := d.newest()
	d.add()
	if m := old.Await("upgraded"); m.Text != "" {
		d.t.Fatalf("Upgrade: %s", m.Text)
	}
}

// wantRefused checks that the upgrade that was ordered returns an error with these texts.
func (d *drainers) wantRefused(texts ...string) {
	d.t.Helper()
	m := d.newest().Await("upgraded")
	for _, text := range texts {
		if !strings.Contains(m.Text, text) || text == "" {
			d.t.Fatalf("Upgrade returned %q, want %q", m.Text, text)
		}
	}
}

// upgradeTwice returns when an upgrade that has to wait has begun, because another is refused
// meanwhile.
func (d *drainers) upgradeTwice() {
	d.t.Helper()
	for range 2 {
		d.newest().Order("upgrade", "1m")
	}
	d.wantRefused(tableflip.ErrUpgradeInProgress.Error())
}

// upgradeInVain checks what an upgrade returns whose time is over while it waits. One whose
// time is over before it begins was cancelled.
func (d *drainers) upgradeInVain(texts ...string) {
	d.t.Helper()
	d.upgradeTwice()
	d.newest().Order("expire")
	d.wantRefused(append(texts, tableflip.ErrParentRunning.Error())...)
}

// end has a process end, and waits for that.
func (d *drainers) end(p *proctest.Process) {
	d.t.Helper()
	p.Order("exit")
	p.AwaitEnd()
	d.ended[p] = true
}

// kill ends a process that may not obey.
func (d *drainers) kill(p *proctest.Process) {
	d.t.Helper()
	proctest.Kill(d.t, p.PID, syscall.SIGKILL)
	p.AwaitEnd()
	d.ended[p] = true
}

// awaitHurry waits until a process was told to hurry.
func (d *drainers) awaitHurry(p *proctest.Process) {
	d.t.Helper()
	p.Await("hurry")
	d.hurried[p] = true
}

// wantAll checks what all processes tell: who lives, and which of them have been told to
// hurry. What they are told by others comes in order, so that whoever knows the newest one
// has heard all that was said before.
func (d *drainers) wantAll() {
	d.t.Helper()
	for i, p := range d.all {
		if d.ended[p] {
			continue
		}
		var want []string
		older := 0
		for j, other := range d.all {
			newest := other == d.newest()
			if d.ended[other] || i < j && !newest { // who has been replaced knows of no other
				continue
			}
			if j < i {
				older++
			}
			state := "draining"
			if newest {
				state = "in charge"
			}
			want = append(want, fmt.Sprint(j+1, " ", other.PID, " ", state))
		}
		if d.hurried[p] {
			want = append(want, "hurries")
		}
		if older == 0 {
			want = append(want, "alone")
		}
		var got string
		proctest.AwaitThat(d.t, fmt.Sprint(p.PID, " knows ", want), func() bool {
			p.Order("look")
			got = p.Await("look").Text
			return got == strings.Join(want, ", ")
		})
	}
}

// Generations end in any order.
func TestDraining(t *testing.T) {
	d := startDraining(t, 3, 3)
	d.wantAll()
	first, second, third := d.all[0], d.all[1], d.all[2]
	d.end(second)
	d.wantAll()
	d.upgrade()
	d.wantAll()
	d.end(first)
	d.end(third)
	d.wantAll()
	d.end(d.all[3])
	d.wantAll()
}

// At the limit the oldest is hurried, and the upgrade waits for a place.
func TestDrainingLimit(t *testing.T) {
	d := startDraining(t, 1, 2)
	first, waiting := d.all[0], d.newest()
	waiting.Order("upgrade", "1m")
	d.awaitHurry(first)
	waiting.Order("upgrade", "1m")
	d.wantRefused(tableflip.ErrUpgradeInProgress.Error())
	waiting.Order("add") // the registry is not frozen
	if m := waiting.Await("added"); m.Text != "" {
		t.Error(m.Text)
	}
	d.wantAll()
	d.end(first)
	d.wantUpgraded()
	d.wantAll()

	d.newest().Order("upgrade", "1m")
	d.awaitHurry(d.all[1])
	d.end(waiting) // whose end also makes a place
	d.wantUpgraded()
	d.wantAll()
}

// A version that allows fewer waits until enough have ended, and hurries no more than it needs.
func TestDrainingLimitLowered(t *testing.T) {
	d := startDraining(t, 3, 2)
	d.newest().Order("upgrade", "1m", proctest.WithArg("1"))
	d.wantUpgraded()
	waiting := d.newest()
	d.upgradeTwice()
	d.awaitHurry(d.all[0])
	d.awaitHurry(d.all[1])
	d.end(d.all[1])
	d.wantAll()
	time.Sleep(time.Second / 10) // in which nothing must be started
	waiting.Order("look")
	if m := waiting.Await("look"); strings.Contains(m.Text, ", 5 ") {
		t.Errorf("while two drain, the generations are %s", m.Text)
	}
	d.end(d.all[0])
	d.wantUpgraded()
	d.wantAll()
}

// Whoever is asked for an upgrade that it cannot make any more has the process in charge
// make it.
func TestDrainingAsked(t *testing.T) {
	d := startDraining(t, 5, 3)
	d.all[0].Order("keep")
	d.newest().Await("asked")
}

// While an upgrade waits, nothing is started, and it can be ended.
func TestDrainingLimitEnds(t *testing.T) {
	d := startDraining(t, 1, 2)
	first, waiting := d.all[0], d.newest()
	waiting.Order("rehearse") // for which nobody hurries
	if m := waiting.Await("rehearsed"); m.Text != "" {
		t.Error(m.Text)
	}
	d.wantAll()
	d.upgradeInVain(strconv.Itoa(first.PID), os.ErrDeadlineExceeded.Error())
	d.awaitHurry(first)
	d.wantAll()

	d.upgradeTwice()
	waiting.Order("cancel")
	if m := waiting.Await("upgraded"); m.Text != "tableflip: upgrade cancelled: context canceled" {
		t.Errorf("Upgrade, which was cancelled, returned %q", m.Text)
	}
	d.upgradeTwice()
	waiting.Order("stop")
	waiting.Take("stopped")
	d.wantRefused(tableflip.ErrStopped.Error())
}

// Without the option an upgrade is refused at once, and with it by a version that has it
// no more.
func TestDrainingNone(t *testing.T) {
	d := startDraining(t, 0, 1)
	d.newest().Order("upgrade", "1m")
	d.wantRefused(tableflip.ErrParentRunning.Error())
	d.wantAll()
	d.end(d.all[0])
	d.upgrade()
	d.wantAll()
}

// An older generation is not told anything by the end of one that is not in charge.
func TestDrainingMiddleKilled(t *testing.T) {
	d := startDraining(t, 5, 3)
	d.kill(d.all[1])
	d.wantAll()
	d.kill(d.all[2])
	d.wantAll()
	d.upgrade() // which the first one hears of
	d.wantAll()
}

// All that drain learn that nobody is in charge.
func TestDrainingNewestKilled(t *testing.T) {
	d := startDraining(t, 5, 3)
	d.wantAll()
	d.kill(d.newest())
	for _, p := range d.all[:3] {
		p.Await("hurry")
	}
}

// They need nobody to tell them.
func TestDrainingNewestKilledMiddleStuck(t *testing.T) {
	d := startDraining(t, 5, 2)
	d.wantAll()
	proctest.Suspend(t, d.all[1].PID)
	d.kill(d.newest())
	d.all[0].Await("hurry")
}

// All that drain learn that the service was stopped, and may take their time.
func TestDrainingStopped(t *testing.T) {
	d := startDraining(t, 5, 2)
	newest := d.newest()
	newest.Order("stop")
	newest.Await("stopped")
	d.end(newest)
	for i, p := range d.all[:2] {
		var want []string
		for j, other := range d.all[:i+1] {
			want = append(want, fmt.Sprint(j+1, " ", other.PID, " draining"))
		}
		if i == 0 {
			want = append(want, "alone")
		}
		proctest.AwaitThat(t, "the end of the newest is known", func() bool {
			p.Order("look")
			return p.Await("look").Text == strings.Join(want, ", ")
		})
	}
}

// One that hears nothing holds up the upgrades that need its place, and no other.
func TestDrainingStuck(t *testing.T) {
	d := startDraining(t, 2, 1)
	first := d.all[0]
	proctest.Suspend(t, first.PID)
	d.upgrade()
	d.upgrade()
	d.upgradeInVain(strconv.Itoa(first.PID))
	d.newest().Order("upgrade", "1m")
	d.kill(first)
	d.wantUpgraded()
	d.wantAll()
}

// An upgrade that fails leaves nothing open of what it would have passed on.
func TestDrainingUpgradeFails(t *testing.T) {
	t.Parallel()
	d := startDraining(t, 2, 2)
	fail := func() map[string]int {
		d.newest().Order("upgrade", "1m", proctest.Environment("fail"))
		d.wantRefused("exit status 7")
		return proctest.KindsOf(proctest.OpenFiles(t, d.newest().PID))
	}
	before := fail() // there may be more of some after the first start
	if after := fail(); !maps.Equal(after, before) {
		t.Errorf("descriptors are open %v, and were %v", after, before)
	}
	d.upgrade()
	d.wantAll()
}

// What a generation has does not depend on how many there were before it.
func TestDrainingFlat(t *testing.T) {
	t.Parallel()
	const upgrades = 200
	d := startDraining(t, 2, 3)
	has := func() (descriptors, goroutines int) {
		newest := d.newest()
		newest.Order("look") // which it does once all its goroutines are there
		newest.Await("look")
		return len(proctest.OpenFiles(t, newest.PID)), newest.CountGoroutines(0)
	}
	var descriptors, goroutines int // early
	for i := range upgrades {
		// In each round another one of the three that drain ends.
		next := i % 3
		d.end(d.all[next])
		d.all = slices.Delete(d.all, next, next+1)
		d.upgrade()
		switch i {
		case 10:
			descriptors, goroutines = has()
		case upgrades - 1:
			// There may be more of both for a moment after Ready.
			proctest.AwaitThat(t, "no more is open, and at work, than early", func() bool {
				open, running := has()
				return open <= descriptors && running <= goroutines
			})
		}
	}
}
