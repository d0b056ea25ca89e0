package handovertest

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/systemd"
	"example.com/tableflip/internal/trial"
)

// No call that may block, and no code of the program, runs under a lock.

// patientNotifier has messages to the manager wait until it reads.
func patientNotifier(t *testing.T) { proctest.Set(t, &systemd.NotifyTimeout, proctest.Patience) }

// wantQuick checks that calls of a process whose upgrade is telling the manager something
// do not wait for that.
func wantQuick(t *testing.T, upg *tableflip.Upgrader, calls map[string]func()) {
	t.Helper()
	var all sync.WaitGroup
	for _, call := range calls {
		all.Go(call)
	}
	done := proctest.Waited(&all)
	select {
	case <-done:
	case <-time.After(proctest.Patience / 2):
		t.Fatal("a method waits for the manager")
	}
}

func TestManagerStuck(t *testing.T) {
	patientNotifier(t)
	m := bindManager(t)
	t.Setenv("NOTIFY_SOCKET", m.socket)
	upg, _ := NewParent(t, tableflip.Options{}, "fail")
	proctest.OK(t, upg.Ready())
	m.clog()
	upgraded := make(chan error, 2)
	for range 2 { // one of which is beside the other
		go func() { upgraded <- upg.Upgrade() }()
	}
	proctest.WantError(t, "the other Upgrade", proctest.Within(t, "Upgrade", upgraded), tableflip.ErrUpgradeInProgress)
	file := proctest.Opened[*os.File](t)(os.Open(os.DevNull))
	wantQuick(t, upg, map[string]func(){
		"HasParent":     func() { upg.HasParent() },
		"Ready":         func() { upg.Ready() },
		"AddFile":       func() { upg.AddFile("a", file) },
		"RemoveFile":    func() { upg.RemoveFile("b") },
		"Listen":        func() { proctest.Opened[interface{ Close() error }](t)(upg.Listen("tcp", "localhost:0")) },
		"Files":         func() { upg.Files() },
		"Upgrade":       func() { upg.Upgrade() },
		"WaitForParent": func() { upg.WaitForParent(t.Context()) },
	})
	if proctest.IsClosed(upgraded) {
		t.Error("the upgrade did not wait for the manager")
	}
	m.read() // and so ends what is under way
	if err := proctest.Within(t, "Upgrade", upgraded); err == nil {
		t.Error("the upgrade succeeded")
	}
}

// However many upgrades are being refused, Stop has to tell its own messages only.
func TestManagerStuckStop(t *testing.T) {
	proctest.Set(t, &systemd.NotifyTimeout, time.Second)
	m := bindManager(t)
	t.Setenv("NOTIFY_SOCKET", m.socket)
	upg, _ := NewParent(t, tableflip.Options{}, "fail")
	proctest.OK(t, upg.Ready())
	m.clog()
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	var refused, asked sync.WaitGroup
	for range 10 {
		asked.Add(1)
		ctx := askedContext{cancelled, sync.OnceFunc(asked.Done)}
		refused.Go(func() { proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled) })
	}
	proctest.Within(t, "the upgrades", proctest.Waited(&asked))
	began := time.Now()
	upg.Stop()
	if took := time.Since(began); took > 5*systemd.NotifyTimeout {
		t.Errorf("Stop took %v", took)
	}
	proctest.Within(t, "the refused upgrades", proctest.Waited(&refused))
}

// A Stop beside another returns when that has stopped.
func TestManagerStuckStops(t *testing.T) {
	patientNotifier(t)
	m := bindManager(t)
	t.Setenv("NOTIFY_SOCKET", m.socket)
	upg := NewUpgrader(t, tableflip.Options{})
	proctest.OK(t, upg.Ready())
	m.clog()
	stop := func() bool { upg.Stop(); return proctest.IsClosed(upg.Exit()) }
	first := proctest.InBackground(stop)
	proctest.AwaitThat(t, "the first has begun", func() bool { return upg.Generations()[0].State == "draining" })
	second := proctest.InBackground(stop)
	time.Sleep(time.Second / 10) // in which it must not return
	m.read()
	for _, stopped := range []<-chan bool{first, second} {
		if !proctest.Within(t, "Stop", stopped) {
			t.Error("Stop has returned before Exit was closed")
		}
	}
}

// An askedContext tells when it was asked whether it has ended.
type askedContext struct {
	context.Context
	asked func()
}

func (c askedContext) Err() error {
	defer c.asked()
	return c.Context.Err()
}

// A curious handler is a Logger's that calls every method of the Upgrader.
type curiousHandler struct {
	slog.Handler
	upg    *atomic.Pointer[tableflip.Upgrader]
	stops  bool
	within *atomic.Int32
	seen   *sync.Map // of messages, whether the Upgrader had stopped
}

func newCurious(stops bool) curiousHandler {
	return curiousHandler{
		Handler: slog.DiscardHandler,
		upg:     new(atomic.Pointer[tableflip.Upgrader]),
		stops:   stops,
		within:  new(atomic.Int32),
		seen:    new(sync.Map),
	}
}

func (h curiousHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h curiousHandler) Handle(_ context.Context, r slog.Record) error {
	upg := h.upg.Load()
	h.seen.Store(r.Message, upg != nil && proctest.IsClosed(upg.Exit()))
	if upg == nil || h.within.Add(1) > 1 {
		return nil // New has not returned, or one of the calls below logs
	}
	defer h.within.Add(-1)
	ended, end := context.WithCancel(context.Background())
	end()
	upg.HasParent()
	upg.Ready()
	upg.Files()
	upg.Conn("tcp", "")
	upg.File("")
	upg.UpgradeContext(ended)
	upg.WaitForParent(ended)
	upg.AddFile("added by the handler", os.Stderr)
	upg.RemoveFile("added by the handler")
	if h.stops {
		upg.Stop()
	}
	return nil
}

func (h curiousHandler) wantSeen(t *testing.T, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !h.hasSeen(text) {
			t.Errorf("the log does not say %q", text)
		}
	}
}

func (h curiousHandler) hasSeen(text string) (found bool) {
	h.seen.Range(func(message, _ any) bool {
		found = strings.Contains(message.(string), text)
		return !found
	})
	return found
}

const noManager, cleaning, noRestore = "can't talk to the service manager", "cleaning up", "can't restore the PID file"

func TestLoggerCalls(t *testing.T) {
	for _, stops := range []bool{false, true} {
		for _, moment := range []string{"Ready", "a failed upgrade", "an upgrade", "Stop"} {
			t.Run(moment+map[bool]string{true: ", and stops"}[stops], func(t *testing.T) {
				m := startedByManager(t)
				curious := newCurious(stops)
				role := "succeed"
				if moment == "a failed upgrade" {
					role = "fail"
				}
				path := filepath.Join(t.TempDir(), "pid")
				upg, _ := NewParent(t, tableflip.Options{Logger: slog.New(curious), PIDFile: path}, role)
				breakAll := func() {
					proctest.OK(t, os.Remove(m.socket))
					if proctest.Exists(path) {
						proctest.OK(t, os.Remove(path))
					}
					if moment != "Ready" && moment != "an upgrade" {
						proctest.OK(t, os.Mkdir(path, 0o700))
					}
				}
				steps := map[string]func(){
					"Ready": func() { upg.Ready() },
					"a failed upgrade": func() {
						proctest.During(t, step.ChildStarted, breakAll)
						upg.Upgrade()
					},
					"an upgrade": func() {
						proctest.During(t, step.ReadyReceived, breakAll)
						upg.Upgrade()
					},
					"Stop": upg.Stop,
				}
				if moment != "Ready" {
					proctest.OK(t, upg.Ready())
				}
				if moment == "Ready" || moment == "Stop" {
					breakAll()
				}
				curious.upg.Store(upg)
				proctest.Within(t, moment, proctest.InBackground(func() bool { steps[moment](); return true }))
				curious.wantSeen(t, noManager)
				switch moment {
				case "a failed upgrade":
					curious.wantSeen(t, noRestore)
				case "Stop":
					curious.wantSeen(t, cleaning)
				}
				proctest.Within(t, "Stop", proctest.InBackground(func() bool { upg.Stop(); return true }))
			})
		}
	}
}

// Nobody needs a Logger.
func TestNoLogger(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	upg, _ := NewParent(t, tableflip.Options{PIDFile: path}, "fail")
	proctest.OK(t, upg.Ready())
	proctest.During(t, step.ChildStarted, func() {
		proctest.OK(t, os.Remove(path))
		proctest.OK(t, os.Mkdir(path, 0o700)) // so that the PID file can't be restored
	})
	if err := upg.Upgrade(); err == nil {
		t.Error("the upgrade succeeded")
	}
	upg.Stop()
}

// The records of a child that takes charge after Upgrade has given it up.
func TestLoggerCallsLate(t *testing.T) {
	shorten(t, &step.AcknowledgeTimeout)
	curious, late := newCurious(true), filepath.Join(t.TempDir(), "late")
	script := `{ echo here -; echo ready; until test -e ` + late + `; do sleep 0.1; done; echo acknowledged; } >&3 <&4 &`
	upg := NewUpgrader(t, tableflip.Options{Logger: slog.New(curious), Command: proctest.Shell(script)})
	proctest.OK(t, upg.Ready())
	proctest.WantError(t, "Upgrade", upg.Upgrade(), os.ErrDeadlineExceeded)
	curious.upg.Store(upg)
	proctest.OK(t, os.WriteFile(late, nil, 0o600))
	proctest.Within(t, "Exit, because the child is in charge", upg.Exit())
	proctest.Within(t, "Stop", proctest.InBackground(func() bool { upg.Stop(); return true }))
	// Stop need not be the last of what holds the record.
	proctest.AwaitThat(t, "the log says that it was committed", func() bool { return curious.hasSeen("committed") })
}

// The child's records: what nobody claimed, a manager that does not hear, and a reload
// that cannot be answered.
func TestLoggerCallsInChild(t *testing.T) {
	for _, stops := range []string{"false", "true"} {
		t.Run("stops "+stops, func(t *testing.T) {
			m := startedByManager(t)
			upg, s := NewParent(t, tableflip.Options{}, "curious", proctest.WithArg(stops))
			proctest.OK(t, proctest.ErrorOf(upg.Listen("tcp", "localhost:0")))
			Upgrade(t, upg)
			child := s.Await("serving").PID
			if stops == "false" {
				proctest.OK(t, os.Remove(m.socket))
				proctest.WantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrUpgraded)
				for range 2 {
					s.Await("logged")
				}
			}
			proctest.Terminate(t, child)
			s.AwaitEnd()
		})
	}
}

// The records of the end of a trial.
func TestLoggerCallsOnTrial(t *testing.T) {
	shorten(t, &step.MaxTrial)
	upg, s := NewParent(t, tableflip.Options{Trial: time.Hour}, "curious", proctest.WithArg("false"))
	Upgrade(t, upg)
	proctest.Terminate(t, s.Await("serving").PID)
	s.AwaitEnd()
}

// The record of why a process stops is handled once it has stopped.
func TestLoggerCallsFailure(t *testing.T) {
	t.Run("Fail", func(t *testing.T) {
		curious := newCurious(true)
		upg := NewUpgrader(t, tableflip.Options{Logger: slog.New(curious)})
		curious.upg.Store(upg)
		proctest.Within(t, "Fail", proctest.InBackground(func() bool { upg.Fail(errors.New("no disk")); return true }))
		if stopped, _ := curious.seen.Load(failing); stopped != true {
			t.Errorf("the Upgrader had stopped when the record was handled: %v", stopped)
		}
	})
	t.Run("Undo", func(t *testing.T) {
		upg, s := NewParent(t, tableflip.Options{Trial: time.Hour}, "undo")
		proctest.OK(t, upg.Ready())
		if err := upg.Upgrade(); err == nil || !strings.Contains(err.Error(), "failed: no disk") {
			t.Errorf("Upgrade returned %v", err)
		}
		if m := s.Await("undone"); m.Text != "true true" {
			t.Errorf("undone, and stopped when the record was handled: %s", m.Text)
		}
	})
}

const failing = "tableflip: this process stops because it has failed"

func init() {
	// undo undoes its trial.
	proctest.Role("undo", func() {
		curious := newCurious(true)
		upg := proctest.Must(tableflip.New(tableflip.Options{Logger: slog.New(curious)}))
		MustBeReady(upg)
		curious.upg.Store(upg)
		undone := trial.Undo(errors.New("no disk"))
		stopped, _ := curious.seen.Load(failing)
		proctest.Report("undone", undone, stopped)
	})
	proctest.Role("curious", func() {
		terminated := proctest.Terminated()
		curious := newCurious(proctest.Arg() == "true")
		logger := slog.New(reportingHandler{curious})
		upg := proctest.Must(tableflip.New(tableflip.Options{Logger: logger}))
		curious.upg.Store(upg)
		MustBeReady(upg)
		proctest.Report("serving")
		<-terminated
		upg.Stop()
	})
}

type reportingHandler struct{ curiousHandler }

func (h reportingHandler) Handle(ctx context.Context, r slog.Record) error {
	err := h.curiousHandler.Handle(ctx, r)
	if strings.Contains(r.Message, noManager) {
		proctest.Report("logged", r.Message)
	}
	return err
}
