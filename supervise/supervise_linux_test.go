package supervise_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"example.com/tableflip/supervise"
)

// startPID1 starts the supervisor as process 1 of a new PID namespace.
func startPID1(t *testing.T, flags []string, role ...string) *bed {
	t.Helper()
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		t.Skip("needs unshare, of util-linux")
	}
	arguments := []string{"-p", "-f", "--mount-proc"}
	if output, err := exec.Command(unshare, append(arguments, "true")...).CombinedOutput(); err != nil {
		t.Skipf("needs to be allowed to create a PID namespace, as root is: %v: %s", err, output)
	}
	b := newBed(t)
	for i := range role {
		role[i] = strings.ReplaceAll(role[i], "DIR", b.dir)
	}
	b.start(exec.Command(unshare, append(append(arguments, os.Args[0]), superviseArguments(flags, role)...)...))
	until(t, "unshare has started it", func() bool {
		pids := childrenOf(b.supervisor.Process.Pid)
		if len(pids) == 1 {
			b.pid = pids[0]
		}
		return len(pids) == 1
	})
	t.Cleanup(func() { syscall.Kill(b.pid, syscall.SIGKILL) }) // if it still waits for it, unshare does not die of it
	return b
}

// stat returns the fields of proc_pid_stat(5) from the third on.
func stat(pid int) []string {
	content, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(content), ") ")
	return strings.Fields(rest)
}

// stateOf returns one letter, or nothing if there is no such process.
func stateOf(pid int) string {
	if fields := stat(pid); len(fields) > 0 {
		return fields[0]
	}
	return ""
}

// pause stops the supervisor.
func (b *bed) pause() {
	b.t.Helper()
	b.signal(syscall.SIGSTOP)
	b.isStopped()
}

func (b *bed) isStopped() {
	b.t.Helper()
	until(b.t, "the supervisor is stopped", func() bool {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", b.pid))
		running := slices.ContainsFunc(threads, func(thread os.DirEntry) bool {
			id, _ := strconv.Atoi(thread.Name())
			return stateOf(id) != "T"
		})
		return err == nil && !running
	})
}

func childrenOf(parent int) (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if fields := stat(pid); len(fields) > 1 && fields[1] == strconv.Itoa(parent) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func TestPID1UpgradesUnderLoad(t *testing.T) {
	t.Parallel()
	b := startPID1(t, nil, "serve", "DIR")
	last := b.upgradeUnderLoad(3, func() { b.signal(syscall.SIGHUP) })
	orphan := last.do("orphan", "")
	if orphan == "" {
		t.Error("no orphan")
	}
	b.signal(syscall.SIGTERM)
	b.ends(0)
}

func TestPID1ExitStatus(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		command, argument string
		status            int
	}{
		{"exit", "7", 7},
		{"die", "", 128 + 9},
	} {
		b := startPID1(t, nil, "puppet")
		first := b.next()
		if first.parent != 1 {
			t.Errorf("started by process %d", first.parent)
		}
		second := first.upgrade(b)
		first.tell("exit", "0")
		first.ends()
		second.tell(test.command, test.argument)
		b.ends(test.status)
	}
}

func TestPID1TermWhileUpgrading(t *testing.T) {
	t.Parallel()
	startPID1(t, nil, "serve", "DIR").isStoppedWhileUpgrading()
}

func TestPID1StopWhileDraining(t *testing.T) {
	t.Parallel()
	startPID1(t, nil, "serve", "DIR").isStoppedWhileDraining()
}

func TestPID1MainProcessDiesWhileUpgrading(t *testing.T) {
	t.Parallel()
	b := startPID1(t, nil, "serve", "DIR")
	first, child := b.isUpgrading()
	first.tell("die", "")
	b.log.await("waiting for a new main process")
	b.signal(syscall.SIGTERM)
	b.log.await("holding")
	if err := os.Remove(filepath.Join(b.dir, "hold")); err != nil {
		t.Fatal(err)
	}
	b.log.await("new main process", fmt.Sprint("pid=", child.pid))
	b.ends(0)
}

func TestOrphansAreReaped(t *testing.T) {
	for _, kind := range []string{"subreaper", "PID 1"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			var b *bed
			if kind == "PID 1" {
				b = startPID1(t, nil, "puppet")
			} else {
				b = startBed(t, nil, "puppet")
			}
			main := b.next()
			for range 3 {
				main.do("orphan", "")
			}
			var orphans []int
			until(t, "they are the supervisor's", func() bool {
				orphans = childrenOf(b.pid)
				return len(orphans) == 4
			})
			for _, pid := range orphans {
				if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(comm) == "sleep\n" {
					syscall.Kill(pid, syscall.SIGKILL)
				}
			}
			until(t, "nothing is left of them", func() bool { return len(childrenOf(b.pid)) == 1 })
			main.do("environment", "")
		})
	}
}

// While the old generation lives, it is the one that learns the new one's status.
func TestMainProcessDiesBeforeItsParent(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	first := b.next()
	second := first.upgrade(b)
	second.tell("exit", "6")
	b.log.await("main process ended")
	first.getsNoMore() // it may finish its drain
	first.tell("exit", "0")
	want := 6
	if !tellsExitStatus() {
		t.Log("before Linux 6.15, only the parent learns the status")
		want = 1
	}
	b.ends(want)
}

func tellsExitStatus() bool {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		return false
	}
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(pidfd)
	cmd.Wait()
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	return unix.IoctlPidfdInfo(pidfd, &info) == nil && info.Mask&unix.PIDFD_INFO_EXIT != 0
}

func TestWhatIsLeftIsStopped(t *testing.T) {
	t.Parallel()
	b := startBed(t, []string{"-stop", "1h"}, "puppet")
	first := b.next()
	helper := first.spawn(b)
	second := first.upgrade(b)
	second.tell("exit", "3")
	helper.gets("SIGTERM")
	first.getsNoMore()
	b.signal(syscall.SIGTERM)
	first.gets("SIGTERM")
	helper.gets("SIGTERM")
	first.tell("exit", "0")
	first.ends()
	helper.tell("exit", "0")
	b.log.await("msg=ended")
}

func TestWhatDoesNotStopIsKilled(t *testing.T) {
	t.Parallel()
	b := startBed(t, []string{"-stop", "10ms"}, "puppet")
	first := b.next()
	second := first.spawn(b).spawn(b)
	first.tell("exit", "3")
	second.ends()
	b.ends(3)
}

func TestTakeoverByNobody(t *testing.T) {
	t.Parallel()
	b := startBed(t, []string{"-takeover", "1h"}, "puppet")
	first := b.next()
	second := first.upgrade(b)
	second.do("notify", "RELOADING=1\nMONOTONIC_USEC=1")
	third := second.spawn(b)
	second.tell("exit", "3")
	b.log.await("waiting for a new main process")
	third.tell("exit", "0") // no other process is left that could
	b.log.await("nobody is left")
	first.tell("exit", "0")
	first.ends()
	b.log.await("msg=ended")
}

// A part of the service that upgrades itself is not the service.
func TestOnlyTheMainProcessHandsOver(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	part := main.spawn(b)
	next := part.spawn(b)
	part.do("notify", fmt.Sprintf("MAINPID=%d\nREADY=1", next.pid))
	part.barrier()
	b.signal(syscall.SIGUSR1)
	main.gets("SIGUSR1")
	next.getsNoMore()
}

// A signal that arrives with the news that the main process is another is not for
// the old one.
func TestSignalsMeetHandOvers(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	for range 5 {
		child := main.spawn(b)
		b.pause()
		main.do("notify", fmt.Sprintf("MAINPID=%d", child.pid))
		b.signal(syscall.SIGUSR1)
		b.signal(syscall.SIGCONT)
		child.getsBoth("SIGUSR1", "SIGCONT")
		main.getsNoMore()
		main = child
	}
}

// Nor is one that arrives when the main process has begun to die.
func TestSignalsMeetDeaths(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	for range 5 {
		main.do("notify", "RELOADING=1\nMONOTONIC_USEC=1")
		child := main.spawn(b)
		main.barrier()
		main.tell("exit", "0")
		b.signal(syscall.SIGHUP)
		child.do("notify", fmt.Sprintf("MAINPID=%d\nREADY=1", child.pid))
		child.gets("SIGHUP")
		child.getsNoMore()
		main = child
	}
}

// Who calls Self may go on without a supervisor, and is no reaper then.
func TestNotStartedIsNoReaper(t *testing.T) {
	broken := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(broken, []byte("#!/nowhere/interpreter\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := (supervise.Supervisor{Command: []string{broken}}).Run(); err == nil {
		t.Fatal("started")
	}
	var isReaper int32
	if err := unix.Prctl(unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&isReaper)), 0, 0, 0); err != nil || isReaper != 0 {
		t.Errorf("reaper: %d, %v", isReaper, err)
	}
}

// What a process said before it died counts.
func TestLastWords(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	for name, handOver := range map[string]func(from, to *puppet) error{
		"message": func(from, to *puppet) error {
			from.do("notify", fmt.Sprintf("MAINPID=%d", to.pid))
			return nil
		},
		"PID file": func(_, to *puppet) error { return os.WriteFile(pidFile, fmt.Append(nil, to.pid), 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			b := startBed(t, []string{"-pid-file", pidFile}, "puppet")
			first := b.next()
			second := first.spawn(b)
			b.pause()
			if err := handOver(first, second); err != nil {
				t.Fatal(err)
			}
			first.tell("exit", "0")
			until(t, "it has ended", func() bool { return stateOf(first.pid) == "Z" })
			second.tell("exit", "9")
			until(t, "it has ended", func() bool { return stateOf(second.pid) == "Z" })
			b.signal(syscall.SIGCONT)
			b.ends(9)
		})
	}
}

func TestLogIsNotRead(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	read.Close()
	defer write.Close()
	cmd := exec.Command(os.Args[0], superviseArguments(nil, []string{"puppet"})...)
	cmd.Stderr = write
	b.run(cmd)
	main := b.next()
	b.signal(syscall.SIGTERM)
	main.gets("SIGTERM")
	main.tell("exit", "8")
	b.ends(8)
}

func TestPassesOn(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	address := filepath.Join(b.dir, "notify")
	own, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	cmd := exec.Command(os.Args[0], superviseArguments(nil, []string{"puppet"})...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+address, "WATCHDOG_PID=1", "WATCHDOG_USEC=2")
	b.start(cmd)
	expect := func(fields ...string) {
		t.Helper()
		text := make([]byte, 1000)
		n, err := own.Read(text)
		if want := fmt.Sprint(strings.Join(fields, "\n"), "\nMAINPID=", b.pid); err != nil || string(text[:n]) != want {
			t.Fatalf("got %q, %v, want %q", text[:n], err, want)
		}
	}
	first := b.next()
	if first.address == address || first.do("environment", "WATCHDOG_PID") != "" || first.do("environment", "WATCHDOG_USEC") != "2" {
		t.Error("the service's environment is the supervisor's")
	}
	first.do("notify", "STATUS=a=b\nREADY=1\nFDSTORE=1")
	expect("READY=1", "STATUS=a=b")
	second := first.upgrade(b)
	expect("RELOADING=1", "MONOTONIC_USEC=1")
	expect("READY=1", "STATUS=")
	first.do("notify", "STOPPING=1") // no longer its business
	first.do("notify", "STATUS=old")
	second.do("notify", "WATCHDOG=1")
	expect("WATCHDOG=1")
	second.do("notify", "STOPPING=1")
	expect("STOPPING=1")
}

func TestSocketActivation(t *testing.T) {
	t.Parallel()
	for _, role := range []string{"supervise", "self"} {
		b := newBed(t)
		arguments := []string{"self"}
		if role == "supervise" {
			arguments = superviseArguments(nil, []string{"puppet"})
		}
		socket, err := os.CreateTemp(b.dir, "")
		if err != nil {
			t.Fatal(err)
		}
		defer socket.Close()
		cmd := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@"`, os.Args[0]}, arguments...)...)
		cmd.ExtraFiles = []*os.File{socket}
		b.start(cmd)
		main := b.next()
		if got := main.do("environment", "TABLEFLIP_SUPERVISOR_EXEC"); got != "" {
			t.Errorf("%s: left in the environment: %s", role, got)
		}
		if got := main.do("environment", "LISTEN_PID"); got != strconv.Itoa(main.pid) {
			t.Errorf("%s: LISTEN_PID=%s in process %d", role, got, main.pid)
		}
		if got, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/3", main.pid)); got != socket.Name() {
			t.Errorf("%s: got %s, %v", role, got, err)
		}
		if got, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/3", b.pid)); got == socket.Name() {
			t.Errorf("%s: the supervisor keeps it open: %v", role, err)
		}
		main.tell("exit", "0")
		b.ends(0)
	}
}

// Whoever polls wakes up. The bound is a wake-up every 50 milliseconds; measured
// were two in a minute.
func TestSleepsWhenIdle(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	b.next().upgrade(b)
	wakeUps := func() (sum int) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", b.pid))
		if err != nil || len(threads) == 0 {
			t.Fatalf("threads %v, %v", threads, err)
		}
		for _, thread := range threads {
			content, _ := os.ReadFile(thread)
			_, rest, _ := strings.Cut(string(content), "\nvoluntary_ctxt_switches:")
			var n int
			fmt.Sscan(rest, &n)
			sum += n
		}
		return sum
	}
	before := wakeUps()
	time.Sleep(time.Second) // what is measured
	after := wakeUps()
	if before == 0 || after-before > 20 {
		t.Errorf("woke up %d times in a second, %d before", after-before, before)
	}
}

func TestSupervisorOpensNoDescriptors(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	current := b.next()
	count := func() int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", b.pid))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return len(entries)
	}
	turn := func() {
		child := current.upgrade(b)
		current.tell("exit", "0")
		current.ends()
		current = child
		current.do("attach", "FDSTORE=1")
	}
	turn()
	before := count()
	for range 3 {
		turn()
	}
	current.barrier()
	if after := count(); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
