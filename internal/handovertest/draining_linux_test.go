package handovertest

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// What the service manager, and other versions of the package, see of several generations
// that drain.

// Only the process that the manager takes for the main process speaks to it.
func TestManagerDraining(t *testing.T) {
	m := newManager(t)
	d := startDraining(t, 2, 3, m.variable())
	m.want(d.all[0].PID, "READY=1")
	for i, p := range d.all[:3] {
		m.want(p.PID, reloading, mainPID(d.all[i+1].PID), barrier)
	}
	newest := d.newest()
	d.all[0].Order("upgrade", "1m") // as one that systemd has asked for before it knew better
	if m := d.all[0].Await("upgraded"); m.Text != tableflip.ErrUpgraded.Error() {
		t.Errorf("Upgrade returned %q", m.Text)
	}
	m.want(newest.PID, reloading, "READY=1")
	newest.Order("upgrade", "1m")
	m.want(newest.PID, reloading) // before it waits
	newest.Order("expire")
	d.wantRefused(tableflip.ErrParentRunning.Error())
	if n := m.next(); n.PID != newest.PID || !strings.HasPrefix(n.Text, "READY=1\nSTATUS=upgrade failed: parent hasn't exited: ") {
		t.Errorf("%d told systemd %q", n.PID, n.Text)
	}
	for _, p := range d.all[:3] { // the ends of these are nothing to it
		d.end(p)
	}
	d.wantAll()
	d.upgrade()
	m.want(newest.PID, reloading, mainPID(d.newest().PID), barrier)
	d.newest().Order("stop")
	d.newest().Await("stopped")
	m.want(d.newest().PID, "STOPPING=1")
	m.wantNoMore()
}

// Before the manager listens to a process, that can't be replaced.
func TestManagerDrainingUnheard(t *testing.T) {
	m := newManager(t)
	d := newDrainers(t)
	d.Start(d.command(2, m.variable(), d.PauseAt(step.AcknowledgementReceived)))
	d.add()
	first := d.newest()
	first.Order("upgrade", "1m")
	d.add()
	second := d.newest()
	d.upgradeInVain(strconv.Itoa(first.PID))
	second.Order("upgrade", "1m")
	first.Resume()
	d.wantUpgraded()
	m.want(first.PID, "READY=1", reloading, mainPID(second.PID), barrier)
	m.want(second.PID, reloading, mainPID(d.newest().PID), barrier)
	m.wantNoMore()
}

func init() {
	// successor of the first version, which knows nothing of earlier generations.
	proctest.Role("old", func() {
		parent, names, _ := speakAsChild()
		for i := range names {
			proctest.Must(0, syscall.Close(5+i)) // all are of kinds that it does not know
		}
		for _, line := range []string{"here " + strconv.Itoa(os.Getpid()) + " reload", "ready"} {
			proctest.Must(0, parent.say(line))
		}
		if verdict := parent.hear(); verdict != "commit" {
			panic(verdict)
		}
		proctest.Must(0, parent.say("acknowledged"))
		proctest.Report("old", strings.Join(names, " "))
		proctest.UntilKilled()
	})
}

// An earlier version has replaced a process beside which others drain. It does not speak
// to these, and knows only its parent.
func TestVersionDrainingChild(t *testing.T) {
	for _, end := range []string{"middle", "newest"} {
		t.Run(end, func(t *testing.T) {
			d := startDraining(t, 5, 1)
			first, second := d.all[0], d.all[1]
			second.Order("upgrade", "1m", proctest.Environment("old"))
			old := d.Await("old")
			want := fmt.Sprintf("process,parent earlier,ready,1,%[1]d, earlier,verdict,1,%[1]d, earlier,process,1,%[1]d,", first.PID)
			if got := strings.Fields(old.Text); len(got) != 4 {
				t.Errorf("the earlier version got %s, want %s", old.Text, want)
			} else {
				for i, prefix := range strings.Fields(want) {
					if !strings.HasPrefix(got[i], prefix) {
						t.Errorf("the earlier version got %s, want %s", got[i], prefix)
					}
				}
			}
			if m := second.Await("upgraded"); m.Text != "" {
				t.Fatalf("Upgrade: %s", m.Text)
			}
			if end == "newest" {
				proctest.Terminate(t, old.PID)
				second.Await("hurry")
				first.Await("hurry")
				return
			}
			d.end(second)
			proctest.AwaitThat(t, "the end is known, and is nothing to hurry for", func() bool {
				first.Order("look")
				return first.Await("look").Text == fmt.Sprintf("1 %d draining, alone", first.PID)
			})
		})
	}
}

// A process that an elder has forked has its end of the pipe open, which therefore does not
// tell of its death.
func TestDrainingPipeHeld(t *testing.T) {
	d := startDraining(t, 1, 2)
	first, second := d.all[0], d.all[1]
	first.Order("fork")
	holder, err := strconv.Atoi(first.Await("forked").Text)
	proctest.OK(t, err)
	d.Watch(holder)
	d.end(second)
	d.newest().Order("upgrade", "1m")
	d.wantUpgraded()
	d.newest().Order("upgrade", "1m")
	d.awaitHurry(first)
	d.kill(first)
	d.wantUpgraded()
	d.wantAll()
	d.end(d.all[2])
	d.end(d.all[3])
	d.wantAll()
}

// The end of an earlier generation is the parent's to tell while that is in charge. In
// another PID namespace an elder has no PID.
func TestDrainingElderOfStarting(t *testing.T) {
	for _, test := range []struct {
		name, words, script string
		pid                 int
	}{
		{"same PID namespace", "generation=5", `exec "$0"`, 77},
		{"another", "generation=5 pidns=other", `"$0" & wait`, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := proctest.NewService(t)
			cmd := s.Command("lineage", s.Wire())
			proctest.Shell(test.script)(cmd)
			parent, _, verdictWrite := speakBesideElder(t, cmd, test.words, 77)
			child := s.Next()
			child.Order("new")
			if m := child.Await("new"); !strings.HasPrefix(m.Text, fmt.Sprint("4 ", test.pid, " draining, ")) {
				t.Errorf("the generations are %s", m.Text)
			}
			child.Order("look")
			if m := child.Await("look"); !strings.HasPrefix(m.Text, "4 ") {
				t.Errorf("before the end of the elder, the generations are %s", m.Text)
			}
			verdictWrite.Close()
			proctest.AwaitThat(t, "the end is known", func() bool {
				child.Order("look")
				return !strings.HasPrefix(child.Await("look").Text, "4 ")
			})
			child.Order("ready")
			parent.hear() // here
			parent.want(t, "ready")
			parent.sayAll(t, "commit")
			child.Await("ready")
			child.Order("events")
			if m := child.Await("events"); strings.Contains(m.Text, "generation=4") {
				t.Errorf("the events are %s", m.Text)
			}
		})
	}
}

// Nor does it know the PID of its successor there.
func TestDrainingElderHears(t *testing.T) {
	for _, test := range []struct{ name, words, script, want string }{
		{"same PID namespace", "generation=5", `exec "$0"`, "succeeded %d 6"},
		{"another", "generation=5 pidns=other", `"$0" & wait`, "succeeded - 6"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := proctest.NewService(t)
			cmd := s.Command("lineage", s.Wire())
			proctest.Shell(test.script)(cmd)
			parent, readyRead, _ := speakBesideElder(t, cmd, test.words, 77)
			child := s.Next()
			child.Order("new")
			child.Await("new")
			child.Order("ready")
			parent.hear() // here
			parent.want(t, "ready")
			parent.sayAll(t, "commit")
			elder := spokenTo{speaker: speaker{hearing: bufio.NewReader(readyRead)}}
			elder.want(t, strings.Replace(test.want, "%d", strconv.Itoa(child.PID), 1))
		})
	}
}

// An elder whose pipe is closed, and whose process has not ended yet, is no generation any
// more, and not passed on.
func TestDrainingElderExecutes(t *testing.T) {
	d := newDrainers(t)
	sleeper, handle := startSleeper(t)
	parent, _, verdictWrite := speakBesideElder(t, d.command(5), "generation=5", sleeper.Process.Pid, handle)
	parent.hear() // here
	parent.want(t, "ready")
	parent.sayAll(t, "commit")
	d.add()
	before := proctest.KindsOf(proctest.OpenFiles(t, d.newest().PID))
	verdictWrite.Close()
	proctest.AwaitThat(t, "the pipe is closed on its other end, too", func() bool {
		return proctest.KindsOf(proctest.OpenFiles(t, d.newest().PID))["pipe"] < before["pipe"]
	})
	d.newest().Order("look")
	if m := d.newest().Await("look"); strings.HasPrefix(m.Text, "4 ") {
		t.Errorf("the generations are %s", m.Text)
	}
	d.newest().Order("upgrade", "1m", proctest.Environment("fail"))
	d.wantRefused("exit status 7")
}

// Nothing stays open of an elder that has ended.
func TestDrainingElderClosed(t *testing.T) {
	d := startDraining(t, 2, 2)
	before := proctest.KindsOf(proctest.OpenFiles(t, d.newest().PID))["pipe"]
	d.end(d.all[0])
	proctest.AwaitThat(t, "both pipes of the elder are closed", func() bool {
		return proctest.KindsOf(proctest.OpenFiles(t, d.newest().PID))["pipe"] == before-2
	})
}

// What is opened to pass elders on is closed if there are not enough descriptors.
func TestDrainingDescriptors(t *testing.T) {
	t.Parallel()
	d := startDraining(t, 5, 3)
	newest := d.newest()
	fail := func() proctest.Message {
		newest.Order("upgrade", "1m", proctest.Environment("fail"))
		return newest.Await("upgraded")
	}
	wantNoLeakWithFewDescriptors(t, newest, fail)
	d.upgrade()
	d.wantAll()
}

// One that has not been heard of for so long that its pipe is full holds nothing up.
func TestDrainingPipeFull(t *testing.T) {
	d := newDrainers(t)
	parent := speakToChild(t, d.command(1), "", "fd,a", os.Stderr)
	parent.want(t, fmt.Sprintf("here %d", parent.cmd.Process.Pid))
	parent.want(t, "ready")
	parent.sayAll(t, "commit")
	parent.want(t, "acknowledged")
	d.add()
	fillPipe(t, parent.read)
	d.upgrade()
	d.upgradeInVain()
}

// fillPipe writes as much as there is room for.
func fillPipe(t *testing.T, read *os.File) {
	t.Helper()
	path := fmt.Sprintf("/proc/self/fd/%d", read.Fd())
	write, err := syscall.Open(path, syscall.O_WRONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	proctest.OK(t, err)
	defer syscall.Close(write)
	for err == nil {
		_, err = syscall.Write(write, make([]byte, 1))
	}
	proctest.WantError(t, "write", err, syscall.EAGAIN)
}

// An earlier version drains, and hears what it understands of those after its child.
func TestVersionDrainingParent(t *testing.T) {
	d := newDrainers(t)
	file, addr := listenerFile(t)
	parent := speakToChild(t, d.command(1), "", "listener,tcp,127.0.0.1:0,"+addr, file)
	parent.want(t, fmt.Sprintf("here %d", parent.cmd.Process.Pid))
	parent.want(t, "ready")
	parent.sayAll(t, "commit")
	parent.want(t, "acknowledged")
	d.add()
	d.upgrade()
	third := d.newest()
	parent.want(t, fmt.Sprintf("succeeded %d 3", third.PID))
	d.end(d.all[0])
	third.Order("look")
	if m := third.Await("look"); m.Text != fmt.Sprintf("1 %d draining, 3 %d in charge", os.Getpid(), third.PID) {
		t.Errorf("the generations are %s", m.Text)
	}
	d.upgrade()
	parent.want(t, fmt.Sprintf("succeeded %d 4", d.newest().PID))
	d.newest().Order("upgrade", "1m")
	parent.want(t, "hurry")
	parent.saying.Close()
	d.wantUpgraded()
	d.newest().Order("stop")
	d.newest().Await("stopped")
	parent.want(t, "EOF")
}
