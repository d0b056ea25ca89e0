package handovertest

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/systemd"
)

// What others learn of a trial: the service manager, programs that read the log, and
// versions that know no trials.

func init() {
	// tried serves until the trial has ended, and then leaves.
	proctest.Role("tried", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: proctest.Arg()}))
		MustBeReady(upg)
		proctest.Report("on-trial")
		if upg.WaitForParent(context.Background()) == nil {
			proctest.UntilKilled()
		}
		<-upg.Exit()
	})
}

// asked returns a request to a TCP address.
func asked(t *testing.T, addr string) request {
	conn := proctest.Opened[net.Conn](t)(net.Dial("tcp", addr))
	proctest.Must(conn.Write([]byte("who\n")))
	return request{"tcp", conn}
}

func onTrialStatus(pid int) string {
	return fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d\nSTATUS=upgrade: process %d is on trial for 1h0m0s",
		(time.Hour + time.Minute).Microseconds(), pid)
}

func TestTrialManager(t *testing.T) {
	proctest.Set(t, &systemd.ExtendInterval, time.Hour) // which no test waits for
	m := startedByManager(t)
	upg, s := NewParent(t, tableflip.Options{Trial: time.Hour}, "tried")
	proctest.OK(t, upg.Ready())
	m.want(os.Getpid(), "READY=1")
	ctx, cancel := context.WithCancel(t.Context())
	result := proctest.InBackground(func() error { return upg.UpgradeContext(ctx) })
	child := s.Await("on-trial")
	m.want(os.Getpid(), reloading, onTrialStatus(child.PID))
	m.wantNoMore()
	proctest.WantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrUpgradeInProgress) // of another reload
	cancel()
	err := proctest.Within(t, "Upgrade", result)
	proctest.WantError(t, "Upgrade", err, context.Canceled)
	m.want(os.Getpid(), reloading, failed(err))
	proctest.AwaitThat(t, "the child has ended", func() bool { return len(upg.Generations()) == 1 })

	shorten(t, &step.MaxTrial)
	proctest.OK(t, upg.Upgrade())
	child = s.Await("on-trial")
	m.want(os.Getpid(), reloading, onTrialStatus(child.PID), mainPID(child.PID), barrier)
	m.wantNoMore()
}

// What the manager is told of a trial comes before all that follows it, however late the
// manager reads.
func TestTrialManagerLate(t *testing.T) {
	patientNotifier(t)
	m := bindManager(t)
	t.Setenv("NOTIFY_SOCKET", m.socket)
	heard := filepath.Join(t.TempDir(), "heard")
	script := `{ echo here - trial; echo ready; read -r trial; read -r verdict; echo "$verdict" >"` + heard + `"; echo stopping; } >&3 <&4`
	upg := NewUpgrader(t, tableflip.Options{Trial: time.Hour, Command: proctest.Shell(script)})
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancel(t.Context())
	proctest.During(t, step.ReadyReceived, m.clog)
	early := make(chan bool, 1)
	proctest.During(t, step.TrialBegun, func() {
		cancel()
		time.AfterFunc(time.Second/10, func() { // in which the trial must not be undone
			isEarly := proctest.Exists(heard)
			m.read()
			early <- isEarly
		})
	})
	proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	if <-early {
		t.Error("the trial was undone before the manager was told of it")
	}
}

func TestTrialEvents(t *testing.T) {
	events, cancelEvents := event.Subscribe()
	defer cancelEvents()
	logger, log := proctest.NewLogger()
	upg, s := NewParent(t, tableflip.Options{Trial: time.Hour, Logger: logger}, "tried")
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancel(t.Context())
	result := proctest.InBackground(func() error { return upg.UpgradeContext(ctx) })
	child := s.Await("on-trial").PID
	cancel()
	proctest.WantError(t, "Upgrade", proctest.Within(t, "Upgrade", result), context.Canceled)
	log.Await(t, `msg="tableflip: ended"`)
	var got []string
	for _, e := range shownHere(events) {
		got = append(got, strings.ReplaceAll(e, fmt.Sprintf(" pid=%d generation=2", child), " child"))
	}
	self := fmt.Sprintf(" pid=%d generation=1", os.Getpid())
	want := []string{"in charge" + self, "started child", "here child", "ready child", "on trial child",
		"failed child error cause=cancelled took", "ended child took"}
	if strings.Join(got, ", ") != strings.Join(want, ", ") {
		t.Errorf("the events are %q, want %q", got, want)
	}
}

// A child that knows no trials is put in charge at once, which the log says.
func TestTrialVersionParent(t *testing.T) {
	logger, log := proctest.NewLogger()
	upg, s := NewParent(t, tableflip.Options{Trial: time.Hour, Logger: logger}, "speaker", proctest.WithArg("serve"))
	ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "127.0.0.1:0"))
	Upgrade(t, upg)
	child := s.Await("in-charge")
	log.Await(t, "the new version does not know trials")
	if got := proctest.Answer(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.PID) {
		t.Errorf("the answer is %q, want %d", got, child.PID)
	}
}

// A child may say on trial what this version does not know.
func TestTrialUnknownWords(t *testing.T) {
	shorten(t, &step.MaxTrial)
	script := `{ echo here - trial; echo ready; read -r trial; echo; echo hello; read -r commit; echo acknowledged; ` +
		`while read -r line; do :; done; } >&3 <&4`
	upg := NewUpgrader(t, tableflip.Options{Trial: time.Hour, Command: proctest.Shell(script)})
	Upgrade(t, upg)
}

// A rehearsal has no trial.
func TestTrialRehearsal(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{Trial: time.Hour}, "speaker", proctest.WithArg("rehearsed, trial"))
	proctest.OK(t, upg.Ready())
	proctest.OK(t, upg.Rehearse(t.Context()))
	if m := s.Await("verdict"); m.Text != "abort" {
		t.Errorf("the child heard %q", m.Text)
	}
}

// What a parent says to a child on trial, and what that answers.
func TestTrialVersionChild(t *testing.T) {
	for _, test := range []struct {
		name    string
		verdict []string
		answer  string
		then    []string // "" for the parent's end
		look    string   // at the end
	}{
		{"commit", []string{"trial again", "unknown", "commit"}, "acknowledged", nil, "in charge"},
		{"abort", []string{"abort it"}, "stopping", nil, "draining, exit"},
		{"abort and hurry", []string{"abort"}, "stopping", []string{"hurry now", "hurry"}, "draining, exit, hurry"},
		{"abort and end", []string{"abort"}, "stopping", []string{""}, "draining, exit, hurry"},
		{"abort and stop", []string{"abort"}, "stopping", []string{"stopping", ""}, "draining, exit"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newChain(t)
			file, addr := listenerFile(t)
			cmd := c.Command("generation", c.Wire(), dirVariable+"="+c.dir, maxDrainingVariable+"=1") // so that it obeys beside its parent
			child := speakToChild(t, cmd, "offers=trial", "listener,tcp,127.0.0.1:0,"+addr, file)
			g := c.Next()
			child.want(t, fmt.Sprintf("here %d trial", g.PID))
			child.want(t, "ready")
			child.sayAll(t, "trial by combat")
			g.AwaitStep(readyReturns)
			if got := proctest.Exists(filepath.Join(c.dir, "pid")); got {
				t.Error("on trial, it has written the PID file")
			}
			held := proctest.Opened[net.Conn](t)(net.Dial("tcp", addr))
			proctest.Must(held.Write([]byte("who")))
			c.wantAnswers([]request{asked(t, addr)}, g.PID) // after which it has accepted the other, too
			child.sayAll(t, test.verdict...)
			child.want(t, test.answer)
			for _, words := range test.then {
				if words == "" {
					child.saying.Close()
				} else {
					child.sayAll(t, words)
				}
			}
			proctest.AwaitThat(t, test.look, func() bool {
				g.Order("look")
				return strings.HasSuffix(g.Await("look").Text, fmt.Sprintf("2 %d %s", g.PID, test.look))
			})
			if proctest.Exists(filepath.Join(c.dir, "pid")) != (test.name == "commit") || proctest.Exists(filepath.Join(c.dir, "pid.tmp")) {
				t.Error("the PID file is wrong")
			}
			if test.name == "commit" {
				return
			}
			proctest.Must(held.Write([]byte("\n")))
			g.AwaitEnd() // drained
		})
	}
}
