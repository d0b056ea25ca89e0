package handovertest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/queue"
	"example.com/tableflip/internal/step"
)

// The package against speakers of the first version, who say and accept things that the
// package does not know.

func TestVersionParent(t *testing.T) {
	for _, test := range []struct{ name, accepts, heard string }{
		{"accepts nothing", "serve", ""},
		{"accepts what an earlier version offers, and more", "serve and reload", "reload\nreload\n"},
		{"accepts what was offered, and more", "serve, reload and upgrade", "reload\nupgrade\n"},
	} {
		t.Run(test.name, func(t *testing.T) { testVersionParent(t, test.accepts, test.heard) })
	}
}

// testVersionParent checks what the parent says after the commit.
func testVersionParent(t *testing.T, arg, heard string) {
	upg, s := NewParent(t, tableflip.Options{}, "speaker", proctest.WithArg(arg))
	ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "127.0.0.1:0"))
	proctest.OK(t, upg.AddFile("a;b", os.Stderr))
	Upgrade(t, upg)
	child := s.Await("in-charge")
	if names := child.Text; !strings.HasPrefix(names, "listener,tcp,127.0.0.1:0,"+ln.Addr().String()+" fd,a%3Bb") {
		t.Errorf("the child got %s", names)
	}
	if got := proctest.Answer(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.PID) {
		t.Errorf("the answer is %q, want %d", got, child.PID)
	}
	if m := s.Await("offers"); m.Text != "reload,upgrade,earlier,trial" {
		t.Errorf("the parent offers %q", m.Text)
	}
	proctest.WantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrUpgraded)
	queue.Keep()
	proctest.Terminate(t, child.PID)
	if m := s.Await("heard"); m.Text != heard {
		t.Errorf("after the commit, the parent said %q, want %q", m.Text, heard)
	}
}

func TestVersionParentAborts(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(`"$0" & wait`)}, "speaker", proctest.WithArg("refused"))
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancel(t.Context())
	proctest.During(t, step.ReadyReceived, cancel)
	proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	s.AwaitEnd()
}

// A child that knows of no rehearsals is aborted by one.
func TestVersionRehearses(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "speaker", proctest.WithArg("rehearsed"))
	proctest.OK(t, upg.Ready())
	proctest.OK(t, upg.Rehearse(t.Context()))
	if m := s.Await("verdict"); m.Text != "abort" {
		t.Errorf("the child heard %q", m.Text)
	}
}

func init() {
	proctest.Role("speaker", func() {
		terminated := proctest.Terminated()
		parent, names, offers := speakAsChild()
		pid := strconv.Itoa(os.Getpid())
		if proctest.Arg() == "late" {
			pid = "-"
		}
		accepts := "fly later"
		for _, word := range []string{"reload", "upgrade", "trial"} {
			if strings.Contains(proctest.Arg(), word) {
				accepts += " " + word
			}
		}
		for _, line := range []string{"", "hello", "here " + pid + " " + accepts, "words on the way", "ready to go"} {
			proctest.Must(0, parent.say(line))
		}
		verdict := parent.hear()
		switch proctest.Arg() {
		case "serve", "serve and reload", "serve, reload and upgrade":
			if verdict != "commit" {
				panic(verdict)
			}
			for _, line := range []string{"", "please wait", "stopping", "acknowledged with thanks", ""} {
				proctest.Must(0, parent.say(line))
			}
			proctest.Report("in-charge", strings.Join(names, " "))
			proctest.Report("offers", offers)
			conn := proctest.Must(proctest.Must(net.FileListener(os.NewFile(5, "listener"))).Accept())
			proctest.Must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
			conn.Close()
			<-terminated
			syscall.SetNonblock(4, true)
			var heard strings.Builder
			buffer := make([]byte, 100)
			if n, _ := syscall.Read(4, buffer); n > 0 {
				heard.Write(buffer[:n])
			}
			proctest.Report("heard", heard.String())
		case "refused":
			if verdict != "abort" {
				panic(verdict)
			}
		case "rehearsed", "rehearsed, trial":
			word, _, _ := strings.Cut(verdict, " ")
			proctest.Report("verdict", word)
		case "late", "late and known":
			if abort := parent.hear(); verdict != "commit" || abort != "abort" {
				panic(verdict + abort)
			}
			if proctest.Arg() == "late and known" {
				proctest.Report("aborted")
				<-terminated
			}
			proctest.Report("said", parent.say("acknowledged"))
			if proctest.Arg() == "late" {
				// The test, which knows it by no number, cannot end it. A child that
				// dies now was never in charge.
				<-time.After(5 * time.Second)
			}
		}
	})
}

// Words that come with the last one are no reason not to hear that.
func TestVersionLastWords(t *testing.T) {
	for _, test := range []struct{ name, words, says string }{
		{"acknowledged", "echo; echo hello; echo acknowledged; echo bye", ""},
		{"nothing", "echo; echo hello", "did not take charge"},
		{"no end", "printf acknow", "did not take charge"},
	} {
		t.Run(test.name, func(t *testing.T) {
			hearNothingLater(t)
			said := filepath.Join(t.TempDir(), "said")
			upg := NewUpgrader(t, tableflip.Options{Command: proctest.Shell(
				"{ echo here $$; echo ready; read -r commit; " + test.words + "; : >" + said + "; while read -r line; do :; done; } >&3 <&4")})
			proctest.OK(t, upg.Ready())
			proctest.During(t, step.AfterCommit, func() {
				proctest.AwaitThat(t, "all is said", func() bool { return proctest.Exists(said) })
			})
			err := proctest.Within(t, "Upgrade", proctest.InBackground(upg.Upgrade))
			if (err == nil) != (test.says == "") || err != nil && !strings.Contains(err.Error(), test.says) {
				t.Errorf("Upgrade: %v, want %q", err, test.says)
			}
		})
	}
}

// Why a child has failed may not be the first that it says.
func TestVersionFailedLate(t *testing.T) {
	var child *exec.Cmd
	upg := NewUpgrader(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
		proctest.Shell("{ echo here $$; echo ready; echo; echo hello; echo failed no disk; } >&3")(cmd)
		child = cmd
	}})
	proctest.OK(t, upg.Ready())
	proctest.During(t, step.ReadyReceived, func() { proctest.AwaitDeath(t, child.Process.Pid) })
	if err := upg.Rehearse(t.Context()); err == nil || !strings.Contains(err.Error(), "failed: no disk") {
		t.Errorf("Rehearse: %v", err)
	}
}

// A child that was not committed can't take charge, even if it may still be there.
func TestVersionUncommittedStays(t *testing.T) {
	upg := NewUpgrader(t, tableflip.Options{Command: proctest.Shell("echo here - >&3; cat <&4 >/dev/null & exit 1")})
	proctest.OK(t, upg.Ready())
	for range 2 {
		if err := upg.Upgrade(); err == nil || !strings.HasSuffix(err.Error(), "exited before it was ready: exit status 1") {
			t.Errorf("Upgrade: %v", err)
		}
	}
}

// That the death of a child could not be confirmed in time is not why the upgrade has failed.
func TestVersionUnconfirmed(t *testing.T) {
	shorten(t, &step.ExitGrace)
	proctest.Set(t, &step.KillTimeout, 1)
	upg := NewUpgrader(t, tableflip.Options{Command: proctest.Shell("{ echo here $$; echo failed no disk; } >&3; exec sleep 1000")})
	proctest.OK(t, upg.Ready())
	err := upg.Upgrade()
	if err == nil || !strings.Contains(err.Error(), "failed: no disk") || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Upgrade: %v", err)
	}
}

// What is wrong with the binary is said once.
func TestVersionHint(t *testing.T) {
	shell := proctest.Must(os.ReadFile("/bin/sh"))
	for _, says := range []string{"", "echo here $$;"} {
		binary := filepath.Join(t.TempDir(), "service")
		proctest.OK(t, os.WriteFile(binary, shell, 0o755))
		proctest.OK(t, os.WriteFile(binary+".new", shell[:1000], 0o755))
		upg := NewUpgrader(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
			proctest.Shell(fmt.Sprintf("{ mv %[1]s.new %[1]s; %s exit 1; } >&3", binary, says))(cmd)
			cmd.Path = binary
		}})
		proctest.OK(t, upg.Ready())
		if err := upg.Upgrade(); err == nil || strings.Count(err.Error(), binary+" is incomplete") != 1 {
			t.Errorf("after %q, Upgrade: %v", says, err)
		}
		upg.Stop()
	}
}

// A child dies before it hears of its trial.
func TestVersionTrialUnheard(t *testing.T) {
	var child *exec.Cmd
	upg := NewUpgrader(t, tableflip.Options{Trial: time.Hour, Command: func(cmd *exec.Cmd) {
		proctest.Shell("{ echo here $$ trial; echo ready; } >&3")(cmd)
		child = cmd
	}})
	proctest.OK(t, upg.Ready())
	proctest.During(t, step.ReadyReceived, func() { proctest.AwaitDeath(t, child.Process.Pid) })
	if err := upg.Upgrade(); err == nil || !strings.Contains(err.Error(), "was ready, and died or was stopped") {
		t.Errorf("Upgrade: %v", err)
	}
}

// A child of another PID namespace that has closed its pipes can't take charge any more.
func TestVersionUnknownLeaves(t *testing.T) {
	upg := NewUpgrader(t, tableflip.Options{Command: proctest.Shell(
		"{ echo here -; echo ready; read -r commit; } >&3 <&4; exec 3>&- 4<&-; exec sleep 1000")})
	proctest.OK(t, upg.Ready())
	for range 2 {
		if err := upg.Upgrade(); err == nil || !strings.HasSuffix(err.Error(), "died or was stopped before it took charge") {
			t.Errorf("Upgrade: %v", err)
		}
	}
}

// The child takes charge after its abort, and the parent cannot know whether it lives.
func TestVersionAcknowledgesAborted(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make a PID namespace")
	}
	shorten(t, &step.AcknowledgeTimeout)
	upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(`exec unshare --pid --fork "$0"`)}, "speaker", proctest.WithArg("late"))
	proctest.OK(t, upg.Ready())
	err := upg.Upgrade()
	proctest.WantError(t, "Upgrade", err, os.ErrDeadlineExceeded)
	if m := s.Await("said"); m.Text == "<nil>" {
		proctest.Within(t, "Exit, because the child is in charge", upg.Exit())
	} else if proctest.IsClosed(upg.Exit()) {
		t.Error("nobody is in charge")
	}
}

// So it can after the parent has tried to kill it in vain.
func TestUnkillableAcknowledges(t *testing.T) {
	t.Parallel()
	c, parent := startUnkillable(t, step.Step{})
	parent.Order("upgrade", proctest.Environment("speaker"), proctest.WithArg("late and known"))
	child := c.Await("aborted")
	m := parent.Await("upgraded")
	if !strings.Contains(m.Text, "did not take charge") || !strings.Contains(m.Text, strconv.Itoa(child.PID)) {
		t.Errorf("Upgrade returned %q, caused by %q", m.Text, m.Cause)
	}
	c.wantAnswers(c.send(), parent.PID)
	proctest.Terminate(t, child.PID)
	if m := c.Await("said"); m.Text != "<nil>" {
		t.Errorf("the child could not acknowledge: %s", m.Text)
	}
	parent.AwaitEnd()
}

// Stop leaves what is shared to a child that has acknowledged, heard or not.
func TestUnkillableAcknowledgesStop(t *testing.T) {
	t.Parallel()
	c, parent := startUnkillable(t, step.Step{})
	parent.Order("upgrade", proctest.Environment("speaker"), proctest.WithArg("late and known"))
	child := c.Await("aborted")
	parent.Await("upgraded")
	proctest.Suspend(t, parent.PID)
	proctest.Terminate(t, child.PID)
	if m := c.Await("said"); m.Text != "<nil>" {
		t.Errorf("the child could not acknowledge: %s", m.Text)
	}
	parent.Order("stop")
	proctest.Continue(t, parent.PID)
	parent.AwaitEnd()     // it may have heard the child before it could stop
	c.wantFiles("socket") // the child has written no PID file
}

func TestVersionChild(t *testing.T) {
	for _, end := range []string{"commit", "abort", "none"} {
		t.Run(end, func(t *testing.T) {
			s := proctest.NewService(t)
			file, addr := listenerFile(t)
			child := speakToChild(t, s.Command("spoken-to"), "", "listener,tcp,127.0.0.1:0,"+addr+",,,more", file)
			pid := strconv.Itoa(child.cmd.Process.Pid)
			child.want(t, "here "+pid)
			child.sayAll(t, "", "word", "words that nobody knows")
			child.want(t, "ready")
			switch end {
			case "commit":
				child.sayAll(t, "commit at once", "and", "notified of it", "notified", "gone")
				child.want(t, "acknowledged")
				if m := s.Await("Ready"); m.Text != "<nil>" {
					t.Errorf("Ready: %s", m.Text)
				}
				// A parent that does not say which generation it is counts as the first.
				if m := s.Await("generations"); m.Text != fmt.Sprintf("1 %d draining, 2 %s in charge", os.Getpid(), pid) {
					t.Errorf("the generations are %s", m.Text)
				}
				if got := proctest.Answer(t, "tcp", addr); got != pid {
					t.Errorf("the answer is %q, want %s", got, pid)
				}
				child.saying.Close()
				if m := s.Await("WaitForParent"); m.Text != "<nil>" {
					t.Errorf("WaitForParent: %s", m.Text)
				}
			case "none":
				child.saying.Close()
				for _, call := range []string{"Ready", "WaitForParent"} {
					if m := s.Await(call); m.Text != "<nil>" {
						t.Errorf("%s: %s", call, m.Text)
					}
				}
			case "abort":
				child.sayAll(t, "abort because of that")
				if m := s.Await("Ready"); !strings.Contains(m.Text, "aborted") {
					t.Errorf("Ready: %s", m.Text)
				}
			}
		})
	}
}

// A commit that was taken back before it was read is none. Whether Ready would return in
// the time that it takes to hear all lines is up to the scheduler, so that this tries often.
func TestVersionChildCommitTakenBack(t *testing.T) {
	for try := range 10 {
		t.Run(strconv.Itoa(try), func(t *testing.T) {
			s := proctest.NewService(t)
			child := speakToChild(t, s.Command("spoken-to"), "", "fd,a", os.Stderr)
			child.sayAll(t, "commit"+strings.Repeat("\n", 4000)+"abort\nabort\nabort")
			if m := s.Await("Ready"); !strings.Contains(m.Text, "aborted") {
				t.Errorf("Ready: %s", m.Text)
			}
		})
	}
}

// commitBySpeaker starts a generation whose parent is this test, and commits it.
func (c *chain) commitBySpeaker(env ...string) (child spokenTo, g *proctest.Process) {
	c.t.Helper()
	file, addr := listenerFile(c.t)
	cmd := c.Command("generation", append(env, c.Wire(), dirVariable+"="+c.dir)...)
	child = speakToChild(c.t, cmd, "", "listener,tcp,127.0.0.1:0,"+addr, file)
	g = c.Next()
	child.want(c.t, fmt.Sprint("here ", g.PID))
	child.want(c.t, "ready")
	child.sayAll(c.t, "commit")
	return child, g
}

// A child that upgrades waits until its manager listens to it. Until its parent says so, it
// heeds what it knows, and nothing else.
func TestVersionChildNotified(t *testing.T) {
	m := newManager(t)
	c := newChain(t)
	child, g := c.commitBySpeaker(maxDrainingVariable+"=1", m.variable())
	child.want(t, "acknowledged")
	g.AwaitStep(readyReturns)
	child.sayAll(t, "gone", "reload")
	m.want(g.PID, reloading, "READY=1")
	m.wantNoMore()

	g.Order("upgrade")
	time.Sleep(time.Second / 20) // Mostly it waits by then, and need not.
	child.sayAll(t, "notified")
	next := c.Next()
	if err := g.Await("upgraded"); err.Text != "" {
		t.Errorf("Upgrade returned %q", err.Text)
	}
	m.want(g.PID, reloading, mainPID(next.PID), barrier)
	child.saying.Close()
	c.wantStop(next)
}

// A parent that does not hear the acknowledgement any more has said why, unless it is dead.
func TestVersionChildUnheard(t *testing.T) {
	for _, end := range []string{"abort", "death"} {
		t.Run(end, func(t *testing.T) {
			c := newChain(t)
			child, g := c.commitBySpeaker(mishapVariable+"="+waitRefused, c.PauseAt(step.PIDFileWritten))
			g.AwaitStep(step.PIDFileWritten)
			child.read.Close()
			g.Resume()
			time.Sleep(time.Second / 10) // It has mostly found out by then, and need not.
			if end == "abort" {
				child.sayAll(t, "abort")
			} else {
				child.saying.Close()
			}
			want := "" // in charge
			if end == "abort" {
				want = "tableflip: the parent has aborted the upgrade: exit, and leave alone what is shared"
			}
			for _, call := range []string{"refused", "waited"} {
				if m := g.Await(call); m.Text != want {
					t.Errorf("%s: %q, want %q", call, m.Text, want)
				}
			}
		})
	}
}

func init() {
	proctest.Role("spoken-to", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		ln := proctest.Must(upg.Listen("tcp", "127.0.0.1:0"))
		go func() {
			for {
				conn, err := ln.Accept()
				if errors.Is(err, net.ErrClosed) {
					return
				}
				proctest.Must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
				conn.Close()
			}
		}()
		proctest.Report("Ready", upg.Ready())
		proctest.Report("generations", lineage(upg))
		proctest.Report("WaitForParent", upg.WaitForParent(context.Background()))
		proctest.UntilKilled()
	})
}

// A child accepts nothing but what its parent offers and itself knows.
func TestVersionOffers(t *testing.T) {
	for _, test := range []struct{ words, accepted string }{
		{"", ""},
		{"offers=", ""},
		{"offers=fly,walk", ""},
		{"offers=reload", " reload"},
		{"offers=fly,reload,reloads,upgrade offer=walk", " reload upgrade"},
	} {
		t.Run(test.words, func(t *testing.T) {
			s := proctest.NewService(t)
			child := speakToChild(t, s.Command("spoken-to"), test.words, "fd,a", os.Stderr)
			child.want(t, fmt.Sprintf("here %d%s", child.cmd.Process.Pid, test.accepted))
		})
	}
}

// A child in a PID namespace of its own does not know the number by which its parent
// knows it.
func TestVersionNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make a PID namespace")
	}
	s := proctest.NewService(t)
	cmd := s.Command("spoken-to")
	proctest.Shell(`exec unshare --pid --fork --kill-child "$0"`)(cmd)
	speakToChild(t, cmd, "", "fd,a", os.Stderr).want(t, "here -")
}

// When WaitForParent has returned, a child has nothing open that Ready has begun, however
// soon its parent has ended. That it would be seen is up to the scheduler.
func TestVersionChildPrepared(t *testing.T) {
	for try := range 10 {
		t.Run(strconv.Itoa(try), func(t *testing.T) {
			s := proctest.NewService(t)
			child := speakToChild(t, s.Command("count-alone"), "", "fd,a", os.Stderr)
			child.sayAll(t, "commit")
			child.saying.Close()
			if m := s.Await("more"); m.Text != "0" {
				t.Errorf("%s descriptors more than later", m.Text)
			}
		})
	}
}

func init() {
	proctest.Role("count-alone", func() {
		debug.SetGCPercent(-1)
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		proctest.Must(0, upg.WaitForParent(context.Background()))
		alone := proctest.OpenDescriptors()
		// Package os waits for what Ready has begun, too.
		proctest.Must(0, proctest.Must(os.FindProcess(os.Getpid())).Release())
		proctest.Report("more", alone-proctest.OpenDescriptors())
	})
}

// A child that hears an abort before it has acknowledged the commit never has anything for
// itself alone, whether or not its parent has ended.
func TestVersionChildAborted(t *testing.T) {
	s := proctest.NewService(t)
	child := speakToChild(t, s.Command("aborted"), "", "fd,a", os.Stderr)
	child.sayAll(t, "commit")
	s.Await("committed")
	child.sayAll(t, "abort", "upgrade")
	for range 2 {
		if m := s.Await("refused"); !strings.Contains(m.Text, "aborted") {
			t.Errorf("Ready returned %s", m.Text)
		}
	}
	child.saying.Close()
	if m := s.Await("waited"); !strings.Contains(m.Text, "aborted") {
		t.Errorf("WaitForParent returned %s", m.Text)
	}
}

// An orphan that could not write the PID file may try again.
func TestVersionOrphanAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	s := proctest.NewService(t)
	child := speakToChild(t, s.Command("ready-again", proctest.WithArg(path)), "", "fd,a", os.Stderr)
	child.saying.Close()
	if m := s.Await("ready"); !strings.Contains(m.Text, "can't replace the PID file") {
		t.Errorf("Ready returned %s", m.Text)
	}
	if m := s.Await("ready"); m.Text != "<nil>" {
		t.Errorf("later, Ready returned %s", m.Text)
	}
	if content, err := os.ReadFile(path); string(content) != strconv.Itoa(child.cmd.Process.Pid) {
		t.Errorf("the PID file holds %q, %v", content, err)
	}
}

func init() {
	// aborted goes on, when it was put in charge, once it has heard what came before an upgrade.
	proctest.Role("aborted", func() {
		asked := queue.Asked()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		restore := proctest.When(step.VerdictReceived, func() {
			proctest.Report("committed")
			<-asked
		})
		proctest.Report("refused", upg.Ready())
		restore()
		proctest.Report("refused", upg.Ready())
		proctest.Report("waited", upg.WaitForParent(context.Background()))
	})
	proctest.Role("ready-again", func() {
		terminated := proctest.Terminated()
		upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: proctest.Arg()}))
		restore := proctest.When(step.VerdictReceived, func() { proctest.Must(0, os.Remove(proctest.Arg()+".tmp")) })
		proctest.Report("ready", upg.Ready())
		restore()
		proctest.Report("ready", upg.Ready())
		<-terminated
	})
}

// What a later version passes on is closed, wherever it stands in the table.
func TestVersionUnknownKinds(t *testing.T) {
	s := proctest.NewService(t)
	_, handle := startSleeper(t)
	var read, write []*os.File
	for range 14 {
		r, w, err := os.Pipe()
		proctest.OK(t, err)
		t.Cleanup(func() { r.Close(); w.Close() })
		read, write = append(read, r), append(write, w)
	}
	child := speakToChild(t, s.Command("tell-files"), "", "future,a,b;fd,known;process,other,,,,,x;process,parent;earlier,future,1;earlier,ready,one;earlier,verdict,one;"+
		"earlier,ready,2;earlier,verdict,3;later,ready,4;earlier,verdict,4;earlier,future,6;earlier,verdict,6;earlier,ready,7;earlier,future,7;earlier,process,5",
		append(slices.Insert(slices.Clone(write), 1, os.Stderr), handle)...)
	for _, w := range write {
		w.Close()
	}
	child.hear() // here
	child.want(t, "ready")
	child.sayAll(t, "commit")
	child.want(t, "acknowledged")
	if m := s.Await("elders"); m.Text != "0" {
		t.Errorf("the child takes incomplete descriptors for %s earlier generations", m.Text)
	}
	if m := s.Await("last"); strings.Contains(m.Text, "pidfd") {
		t.Errorf("the handle of an incomplete earlier generation is open: %s", m.Text)
	}
	if m := s.Await("files"); m.Text != "[fd:known:]" {
		t.Errorf("the child got the files %s", m.Text)
	}
	for i, r := range read {
		r.SetReadDeadline(time.Now().Add(proctest.Patience))
		if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("descriptor %d of an unknown kind is open: %v", i, err)
		}
	}
}

func init() {
	proctest.Role("tell-files", func() {
		debug.SetGCPercent(-1) // a collection would close what is lost
		last := "/proc/self/fd/20"
		if target := proctest.Must(os.Readlink(last)); !strings.Contains(target, "pidfd") {
			panic("the last descriptor is " + target)
		}
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Report("elders", len(upg.Generations())-2)
		target, _ := os.Readlink(last)
		proctest.Report("last", target)
		var names []string
		for _, file := range proctest.Must(upg.Files()) {
			names = append(names, file.Name())
		}
		MustBeReady(upg)
		proctest.Report("files", names)
		proctest.UntilKilled()
	})
}
