package handovertest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// Some programs remove the variables of the service manager.

var managerVariables = []string{"NOTIFY_SOCKET", "INVOCATION_ID", "MANAGERPID", "WATCHDOG_USEC"}

func TestForgetful(t *testing.T) {
	for _, way := range []string{"clear-before-New", "clear-after-New", "unset-before-New", "unset-after-New", "empty-command", "bare-command"} {
		t.Run(way, func(t *testing.T) {
			m := newManager(t)
			s := proctest.NewService(t)
			cmd := s.Command("forgetful", m.variable(), "INVOCATION_ID=1", "MANAGERPID=2", "WATCHDOG_USEC=3")
			cmd.Args = proctest.Arguments("forgetful", way)
			first := s.Start(cmd)
			want := fmt.Sprint([]string{m.socket, "1", "2", "3"})
			var generations []int
			for range 3 {
				g := s.Await("started")
				if g.Text != want {
					t.Errorf("generation %d has %s, want %s", len(generations)+1, g.Text, want)
				}
				generations = append(generations, g.PID)
			}
			<-first
			m.want(generations[0], "READY=1", reloading, mainPID(generations[1]), barrier)
			m.want(generations[1], reloading, mainPID(generations[2]), barrier)
			proctest.Terminate(t, generations[2])
			m.want(generations[2], "STOPPING=1")
		})
	}
}

func init() {
	proctest.Role("forgetful", func() {
		terminated := proctest.Terminated()
		var found []string
		for _, name := range managerVariables {
			found = append(found, os.Getenv(name))
		}
		way := os.Args[2]
		forget := func(now string) {
			switch way {
			case "clear-" + now:
				os.Clearenv()
			case "unset-" + now:
				for _, name := range managerVariables {
					os.Unsetenv(name)
				}
			}
		}
		generation := 1
		if len(os.Args) > 3 {
			generation += len(os.Args[3])
		}
		forget("before-New")
		upg := proctest.Must(tableflip.New(tableflip.Options{Command: func(cmd *exec.Cmd) {
			cmd.Args = append(os.Args[:3:3], strings.Repeat("x", generation))
			switch way {
			case "empty-command":
				cmd.Env = []string{}
			case "bare-command":
				cmd.Env = []string{"GENERATION=1"}
			}
		}}))
		forget("after-New")
		MustBeReady(upg)
		proctest.Must(0, upg.WaitForParent(context.Background()))
		// The test has to have heard of a generation before there is one after it.
		proctest.Report("started", found)
		if generation < 3 {
			proctest.Must(0, upg.Upgrade())
			return
		}
		<-terminated
		upg.Stop()
	})
}

// A reload that meets a process that has just been replaced is answered by its
// successor.
func TestManagerReloadReplaced(t *testing.T) {
	m := startedByManager(t)
	upg, s := NewParent(t, tableflip.Options{}, "await-reload")
	Upgrade(t, upg)
	child := s.Await("ready")
	m.want(os.Getpid(), "READY=1", reloading, mainPID(child.PID), barrier)
	for range 2 {
		proctest.WantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrUpgraded)
		m.want(child.PID, reloading, "READY=1")
	}
	m.wantNoMore()
	proctest.Kill(t, child.PID, syscall.SIGTERM)
}

func init() {
	proctest.Role("await-reload", func() {
		terminated := proctest.Terminated()
		MustBeReady(proctest.Must(tableflip.New(tableflip.Options{})))
		proctest.Report("ready")
		<-terminated
	})
}
