//go:build unix

package handovertest

import (
	"context"
	"path/filepath"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// All Upgraders of a process have the same parent.

func TestNewAgainInChild(t *testing.T) {
	s, parent := proctest.Start(t, "two-upgraders")
	want := "true <nil> " + tableflip.ErrParentRunning.Error()
	for _, which := range []string{"first", "second"} {
		if m := s.Await(which); m.Text != want {
			t.Errorf("beside the parent, HasParent, Ready and Upgrade of the %s Upgrader: %s, want %s", which, m.Text, want)
		}
	}
	proctest.Terminate(t, parent.Process.Pid)
	if m := s.Await("third"); m.Text != "true <nil> <nil>" {
		t.Errorf("later, HasParent, Ready and WaitForParent: %s", m.Text)
	}
	if m := s.Await("succeeded"); m.Text != "true" {
		t.Errorf("HasParent in the next generation: %s", m.Text)
	}
}

func init() {
	proctest.Role("two-upgraders", func() {
		terminated := proctest.Terminated()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		switch proctest.Arg() {
		case "":
			proctest.SetArg("child")
			MustBeReady(upg)
			proctest.Must(0, upg.Upgrade())
			<-terminated
			return
		case "grandchild":
			MustBeReady(upg)
			proctest.Report("succeeded", upg.HasParent())
			return
		}
		tell := func(which string) {
			proctest.Report(which, upg.HasParent(), upg.Ready(), upg.Upgrade())
			upg.Stop()
			upg = proctest.Must(tableflip.New(tableflip.Options{}))
		}
		tell("first")
		tell("second")
		waited := upg.WaitForParent(context.Background())
		proctest.Report("third", upg.HasParent(), upg.Ready(), waited)
		proctest.SetArg("grandchild")
		proctest.Must(0, upg.Upgrade())
	})
}

// After a Stop before the commit, no later Upgrader of the process can take charge.
func TestNewAgainAbandoned(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "abandon-and-try")
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil {
		t.Error("the upgrade succeeded")
	}
	if m := s.Await("new"); m.Text == "<nil>" {
		t.Error("New returned an Upgrader that would be in charge beside the parent")
	}
}

func init() {
	proctest.Role("abandon-and-try", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		upg.Stop()
		proctest.Report("new", proctest.ErrorOf(tableflip.New(tableflip.Options{})))
	})
}

// Each Upgrader of a process that is in charge has the PID file, from Ready to Stop.
func TestNewAgainPIDFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	upg, s := NewParent(t, tableflip.Options{}, "ready-and-stop", proctest.WithArg(path))
	Upgrade(t, upg)
	for range 2 {
		if m := s.Await("exists"); m.Text != "true false" {
			t.Errorf("after Ready and after Stop, the PID file exists: %s", m.Text)
		}
	}
}

func init() {
	proctest.Role("ready-and-stop", func() {
		for range 2 {
			upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: proctest.Arg()}))
			MustBeReady(upg)
			ready := proctest.Exists(proctest.Arg())
			upg.Stop()
			proctest.Report("exists", ready, proctest.Exists(proctest.Arg()))
		}
	})
}
