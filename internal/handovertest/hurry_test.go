//go:build unix

package handovertest

import (
	"bytes"
	"fmt"
	"os"
	"runtime/pprof"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// These tests are about Hurry: a process that drains learns that its successor has died.

func init() {
	// successor stays in charge until SIGTERM, and then ends in a way.
	proctest.Role("successor", func() {
		terminated := proctest.Terminated()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		proctest.Report("ready")
		<-terminated
		switch proctest.Arg() {
		case "stop":
			upg.Stop()
		case "fail":
			os.Exit(1)
		}
	})
}

func TestHurry(t *testing.T) {
	for _, test := range []struct {
		name, way string
		signal    syscall.Signal
		hurries   bool
	}{
		{"killed", "", syscall.SIGKILL, true},
		{"failed", "fail", syscall.SIGTERM, true},
		{"returned without Stop", "return", syscall.SIGTERM, true},
		{"stopped", "stop", syscall.SIGTERM, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := awaitedSuccessors()
			logger, log := proctest.NewLogger()
			upg, s := NewParent(t, tableflip.Options{Logger: logger}, "successor", proctest.WithArg(test.way))
			Upgrade(t, upg)
			child := s.Await("ready")
			if proctest.IsClosed(upg.Hurry()) {
				t.Error("Hurry is closed while the successor lives")
			}
			proctest.AwaitThat(t, "the end of the successor is awaited", func() bool { return awaitedSuccessors() > 0 })
			proctest.Kill(t, child.PID, test.signal)
			log.Await(t, fmt.Sprintf(`msg="tableflip: ended" process.pid=%d`, child.PID))
			if test.hurries {
				proctest.Within(t, "Hurry", upg.Hurry())
				return
			}
			proctest.AwaitThat(t, "the end of the successor is noticed", func() bool { return awaitedSuccessors() <= before })
			if proctest.IsClosed(upg.Hurry()) {
				t.Error("Hurry is closed, and nobody waits for the end of this process")
			}
		})
	}
}

// Whoever was told to stop may say more.
func TestHurryStopped(t *testing.T) {
	upg := NewUpgrader(t, tableflip.Options{Command: proctest.Shell(
		"{ echo here $$; echo ready; read -r commit; echo acknowledged; echo; echo stopping; echo hello; } >&3 <&4")})
	Upgrade(t, upg)
	proctest.AwaitThat(t, "the end of the successor is noticed", func() bool { return len(upg.Generations()) == 1 })
	if proctest.IsClosed(upg.Hurry()) {
		t.Error("Hurry is closed, and nobody waits for the end of this process")
	}
}

// awaitedSuccessors returns how many of the goroutines that close Hurry run: what does not
// happen has no event. Those of earlier tests may wait for what these have left behind.
func awaitedSuccessors() int { return running("(*Upgrader).outlive(") }

// running returns how many goroutines are in a function of the root package.
func running(function string) int {
	var stacks bytes.Buffer
	proctest.Must(0, pprof.Lookup("goroutine").WriteTo(&stacks, 2))
	return bytes.Count(stacks.Bytes(), []byte("tableflip."+function))
}

// A successor that ends before this process has drained is worth a warning if it has failed,
// and not if it was stopped, or replaced in its turn.
func TestSuccessorEnds(t *testing.T) {
	const warning = "the process that was started by the upgrade ended before the old one did"
	for _, status := range []string{"0", "7"} {
		t.Run(status, func(t *testing.T) {
			logger, log := proctest.NewLogger()
			before := running("(*child).keep.")
			upg := NewUpgrader(t, tableflip.Options{Logger: logger, Command: proctest.Shell(
				"{ echo here $$; echo ready; read -r commit; echo acknowledged; echo stopping; } >&3 <&4; exit " + status)})
			Upgrade(t, upg)
			if status != "0" {
				log.Await(t, warning)
				return
			}
			proctest.AwaitThat(t, "its end is known", func() bool { return running("(*child).keep.") <= before })
			if said := logged(log); strings.Contains(said, warning) {
				t.Errorf("the log says %q", said)
			}
		})
	}
}

// What a later version says that is in charge is ignored unless it is understood.
func TestSuccessorWords(t *testing.T) {
	script := "{ echo here -; echo ready; read -r commit; echo acknowledged; echo; echo succeeded 7 3 later; " +
		"echo preceded 8 4; echo succeeded 9; echo hurry now; cat >/dev/null; } >&3 <&4"
	upg := NewUpgrader(t, tableflip.Options{Command: proctest.Shell(script)})
	Upgrade(t, upg)
	proctest.Within(t, "Hurry", upg.Hurry())
	if all := upg.Generations(); len(all) != 2 || all[1].PID != 7 || all[1].Number != 3 {
		t.Errorf("the generations are %v", all)
	}
}
