//go:build unix

package handovertest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// Who lives, and what is told of an upgrade.

// lineage lists the generations as "NUMBER PID STATE", and says so if a state began
// when it cannot have.
func lineage(upg *tableflip.Upgrader) string {
	var all []string
	for _, g := range upg.Generations() {
		if age := time.Since(g.Since); age < 0 || age > 2*proctest.Patience {
			all = append(all, "since "+g.Since.String())
		}
		all = append(all, fmt.Sprint(g.Number, " ", g.PID, " ", g.State))
	}
	return strings.Join(all, ", ")
}

// show writes an event as its name and its attributes, those that vary without values.
func show(e event.Event) string {
	text := e.Name
	for _, a := range e.Attrs {
		switch a.Key {
		case "pid", "generation", "cause", "replaced", "rehearsal":
			text += " " + a.String()
		case "version", "revision": // depends on how the test was built
		default:
			text += " " + a.Key
		}
	}
	return text
}

// shown returns what was published until now.
func shown(events <-chan event.Event) (all []string) {
	for {
		select {
		case e := <-events:
			all = append(all, show(e))
		default:
			return all
		}
	}
}

// shownHere is shown for tests that are the parent themselves. This process may learn late
// that children of earlier tests have ended.
func shownHere(events <-chan event.Event) []string {
	all := shown(events)
	started := map[string]bool{}
	for _, e := range all {
		if process, found := strings.CutPrefix(e, "started "); found {
			started[strings.Fields(process)[0]] = true
		}
	}
	return slices.DeleteFunc(all, func(e string) bool {
		process, found := strings.CutPrefix(e, "ended ")
		return found && !started[strings.Fields(process)[0]]
	})
}

// messages is a handler that keeps the messages alone.
type messages struct {
	slog.Handler
	all *proctest.Journal[string]
}

func (m messages) Enabled(context.Context, slog.Level) bool { return true }

func (m messages) Handle(_ context.Context, r slog.Record) error {
	m.all.Add(r.Message)
	return nil
}

func init() {
	// lineage does each thing when it is told to.
	proctest.Role("lineage", func() {
		w := proctest.OpenWire()
		events, _ := event.Subscribe()
		log := messages{all: new(proctest.Journal[string])}
		var upg *tableflip.Upgrader
		for order := range w.Orders() {
			switch order.Do {
			case "new":
				upg = proctest.Must(tableflip.New(tableflip.Options{Logger: slog.New(log)}))
			case "ready":
				MustBeReady(upg)
			case "wait":
				proctest.Must(0, upg.WaitForParent(context.Background()))
				for !slices.Contains(log.all.All(), "tableflip: "+event.Ended) { // as it says at about the same time
					time.Sleep(time.Millisecond) // a poll
				}
			case "upgrade":
				go func() {
					proctest.Must(0, upg.Upgrade())
					w.Report("upgraded", lineage(upg))
				}()
			case "stop":
				upg.Stop()
			case "exit":
				os.Exit(0)
			case "events":
				w.Report("events", strings.Join(shown(events), ", "))
				w.Report("log", strings.Join(log.all.All(), ", "))
				continue
			}
			w.Report(order.Do, lineage(upg))
		}
	})
}

func TestGenerations(t *testing.T) {
	s := proctest.NewService(t)
	s.Start(s.Command("lineage", s.Wire()))
	want := func(p *proctest.Process, event, text string) {
		t.Helper()
		if got := p.Await(event).Text; got != text {
			t.Errorf("%s: %s, want %s", event, got, text)
		}
	}
	do := func(p *proctest.Process, order, text string) {
		t.Helper()
		p.Order(order)
		want(p, order, text)
	}

	first := s.Next()
	do(first, "new", fmt.Sprintf("1 %d starting", first.PID))
	do(first, "ready", fmt.Sprintf("1 %d in charge", first.PID))
	first.Order("upgrade")
	second := s.Next()
	do(second, "new", fmt.Sprintf("1 %d in charge, 2 %d starting", first.PID, second.PID))
	do(first, "look", fmt.Sprintf("1 %d in charge, 2 %d starting", first.PID, second.PID))
	bothAfter := fmt.Sprintf("1 %d draining, 2 %d in charge", first.PID, second.PID)
	do(second, "ready", bothAfter)
	want(first, "upgraded", bothAfter)
	do(second, "look", bothAfter)
	first.Order("exit")
	do(second, "wait", fmt.Sprintf("2 %d in charge", second.PID))

	second.Order("upgrade")
	third := s.Next()
	do(third, "new", fmt.Sprintf("2 %d in charge, 3 %d starting", second.PID, third.PID))
	do(third, "ready", fmt.Sprintf("2 %d draining, 3 %d in charge", second.PID, third.PID))
	third.Order("stop")
	want(third, "stop", fmt.Sprintf("2 %d draining, 3 %d draining", second.PID, third.PID))
	third.Order("exit")
	third.AwaitEnd()
	second.AwaitStep(step.ManagerNotified)
	proctest.AwaitThat(t, "the parent knows of the end", func() bool {
		second.Order("look")
		return second.Await("look").Text == fmt.Sprintf("2 %d draining", second.PID)
	})
}

// The child is the process that serves, and not the wrapper that has started it.
func TestGenerationsWrapper(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(`"$0"; exit`)}, "succeed")
	var all []tableflip.Generation
	proctest.During(t, step.ReadyReceived, func() { all = upg.Generations() })
	Upgrade(t, upg)
	if child := s.Await("ready"); len(all) != 2 || all[1].PID != child.PID || all[1].State != "starting" {
		t.Errorf("the generations are %v, and the child was %d", all, child.PID)
	}
}

func TestEvents(t *testing.T) {
	s := proctest.NewService(t)
	s.Start(s.Command("lineage", s.Wire()))
	// The attributes that name a process, and those that vary.
	named := func(name string, p *proctest.Process, n int, more string) string {
		return fmt.Sprintf("%s pid=%d generation=%d%s", name, p.PID, n, more)
	}
	want := func(p *proctest.Process, events ...string) {
		t.Helper()
		p.Order("events")
		if got, want := p.Await("events").Text, strings.Join(events, ", "); got != want {
			t.Errorf("the events are\n%s, want\n%s", got, want)
		}
		var messages []string
		for _, e := range events {
			name, _, _ := strings.Cut(e, " pid=")
			messages = append(messages, "tableflip: "+name)
		}
		if got, want := p.Await("log").Text, strings.Join(messages, ", "); got != want {
			t.Errorf("the log says\n%s, want\n%s", got, want)
		}
	}
	first := s.Next()
	first.Order("new")
	first.Order("ready")
	first.Order("upgrade")
	second := s.Next()
	second.Order("new")
	second.Order("ready")
	second.Await("ready")
	first.Await("upgraded")
	want(first,
		named("in charge", first, 1, ""),
		named("started", second, 2, ""),
		named("here", second, 2, ""),
		named("ready", second, 2, ""),
		named("committed", second, 2, " took"),
		named("draining", first, 1, " replaced=true"),
	)
	second.Order("stop")
	second.Await("stop")
	first.Order("exit")
	second.Order("wait")
	second.Await("wait")
	want(second,
		named("in charge", second, 2, ""),
		named("draining", second, 2, " replaced=false"),
		named("ended", first, 1, " took"), // and not before
	)
}

func TestEventsFailure(t *testing.T) {
	says := proctest.Shell("echo failed no disk >&3")
	committed := func(then string) func(*exec.Cmd) {
		return proctest.Shell("{ echo here -; echo ready; read -r commit; " + then + "; } >&3 <&4")
	}
	for _, test := range []struct {
		cause   string
		command func(*exec.Cmd)
		stop    bool
		cancel  error
		timeout time.Duration
		steps   string
	}{
		{cause: "parent", command: proctest.Unstartable, steps: "failed"},
		{cause: "child", command: proctest.Shell("exit 7"), steps: "started failed"},
		{cause: "reason", command: says, steps: "started failed"},
		{cause: "child", command: committed("exit 7"), steps: "started here ready failed"},
		{cause: "reason", command: committed("echo failed no disk"), steps: "started here ready failed"},
		{cause: "timeout", timeout: time.Millisecond, steps: "started failed"},
		{cause: "timeout", cancel: context.DeadlineExceeded, steps: "started failed"},
		{cause: "cancelled", cancel: context.Canceled, steps: "started failed"},
		{cause: "stopped", stop: true, steps: "started failed draining"},
	} {
		t.Run(test.cause, func(t *testing.T) {
			hangs := proctest.Shell("exec sleep 1000")
			if test.command == nil {
				test.command = hangs
			}
			events, cancelEvents := event.Subscribe()
			defer cancelEvents()
			upg, _ := NewParent(t, tableflip.Options{Command: test.command, UpgradeTimeout: test.timeout}, "fail")
			proctest.OK(t, upg.Ready())
			shown(events)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			stopped := make(chan struct{})
			close(stopped)
			if test.cancel != nil {
				proctest.During(t, step.ChildStarted, func() { cancel(test.cancel) })
			}
			if test.stop {
				stopped = make(chan struct{})
				proctest.During(t, step.ChildStarted, func() {
					go func() {
						upg.Stop()
						close(stopped)
					}()
				})
			}
			if err := upg.UpgradeContext(ctx); err == nil {
				t.Fatal("no error")
			}
			proctest.Within(t, "Stop", stopped)
			got := shownHere(events)
			var names []string
			for _, e := range got {
				name, _, _ := strings.Cut(e, " ")
				names = append(names, name)
			}
			if strings.Join(names, " ") != test.steps {
				t.Fatalf("the events are %q, want %s", got, test.steps)
			}
			failed := got[slices.Index(names, "failed")]
			if !strings.Contains(failed, " error cause="+test.cause+" took") {
				t.Errorf("got %q", failed)
			}
			if strings.Contains(failed, " pid=") != strings.Contains(test.steps, "started") {
				t.Errorf("got %q", failed)
			}
			if generations := upg.Generations(); len(generations) != 1 || generations[0].PID != os.Getpid() {
				t.Errorf("the generations are %v", generations)
			}
		})
	}
}

// A call that is refused is no step of an upgrade, and its caller knows: the log, whose
// handler may have been the caller, says nothing.
func TestEventsRefusal(t *testing.T) {
	events, cancel := event.Subscribe()
	defer cancel()
	logger, lines := proctest.NewLogger()
	upg := NewUpgrader(t, tableflip.Options{Logger: logger})
	proctest.WantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrNotReady)
	if got := shownHere(events); !slices.Equal(got, []string{"refused error"}) {
		t.Errorf("the events are %q", got)
	}
	upg.Stop() // nor has it been in charge
	if got := shownHere(events); len(got) > 0 {
		t.Errorf("the events of Stop are %q", got)
	}
	if proctest.IsClosed(lines) {
		t.Error("it was logged")
	}
}
