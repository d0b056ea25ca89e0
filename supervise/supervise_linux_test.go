package supervise_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/supervise"
)

// startPID1 starts the supervisor as process 1 of a new PID namespace.
func startPID1(t *testing.T, flags []string, role string) *bed {
	t.Helper()
	return startUnshared(t, []string{"-p", "-f", "--mount-proc"}, superviseArguments(flags, role))
}

// startUnshared starts a command in new namespaces.
func startUnshared(t *testing.T, arguments, command []string) *bed {
	t.Helper()
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		t.Skip("needs unshare, of util-linux")
	}
	if output, err := exec.Command(unshare, append(arguments, "true")...).CombinedOutput(); err != nil {
		t.Skipf("needs to be allowed to create a PID namespace, as root is: %v: %s", err, output)
	}
	b := newBed(t)
	b.start(exec.Command(unshare, append(arguments, command...)...))
	proctest.AwaitThat(t, "unshare has started it", func() bool {
		pids := proctest.ChildrenOf(b.supervisor.Process.Pid)
		if len(pids) == 1 {
			b.pid = pids[0]
		}
		return len(pids) == 1
	})
	b.service.Watch(b.pid) // if it still waits for it, unshare does not die of SIGKILL
	return b
}

func TestPID1UpgradesUnderLoad(t *testing.T) {
	t.Parallel()
	b := startPID1(t, nil, "serve")
	last := b.upgradeUnderLoad(3, func() { b.signal(syscall.SIGHUP) })
	orphan := last.do("orphan")
	if orphan == "" {
		t.Error("no orphan")
	}
	b.signal(syscall.SIGTERM)
	b.wantStatus(0)
}

// A /proc of another PID namespace says nothing.
func TestPID1ForeignProc(t *testing.T) {
	t.Parallel()
	b := startForeignProc(t, nil)
	first := b.next()
	second := first.upgrade(b)
	first.Order("exit", "0")
	first.AwaitEnd()
	second.Order("exit", "9")
	b.wantStatus(9)
}

func startForeignProc(t *testing.T, flags []string) *bed {
	t.Helper()
	return startUnshared(t, []string{"-p", "-f"}, superviseArguments(flags, "puppet"))
}

// What is left gets its signal, and has its time.
func TestForeignProcCrash(t *testing.T) {
	t.Parallel()
	b := startForeignProc(t, []string{"-stop", "1h", "-hurry", "1ms"})
	main := b.next()
	helper := main.spawn(b)
	main.Order("exit", "3")
	helper.wantSignals("SIGTERM")
	for began := time.Now(); time.Since(began) < 50*time.Millisecond; {
		helper.barrier()
	}
	helper.Order("exit", "0")
	b.wantStatus(3)
}

func TestForeignProcTakeoverByNobody(t *testing.T) {
	t.Parallel()
	b := startForeignProc(t, []string{"-takeover", "1h"})
	main := b.next()
	main.beginUpgrade()
	main.Order("exit", "3")
	b.wantStatus(3)
}

// A process is not taken for its own supervisor.
func TestForeignProcSelf(t *testing.T) {
	t.Parallel()
	b := startUnshared(t, []string{"-p", "-f"}, proctest.Arguments("self"))
	main := b.next()
	if got := main.do("environment", "TABLEFLIP_SUPERVISOR"); got != "1" {
		t.Errorf("supervisor %q, want 1", got)
	}
	main.Order("exit", "4")
	b.wantStatus(4)
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
		if parent := first.do("parent"); parent != "1" {
			t.Errorf("started by process %s", parent)
		}
		second := first.upgrade(b)
		first.Order("exit", "0")
		first.AwaitEnd()
		second.Order(test.command, test.argument)
		b.wantStatus(test.status)
	}
}

func TestPID1TermWhileUpgrading(t *testing.T) {
	t.Parallel()
	startPID1(t, nil, "serve").isStoppedWhileUpgrading()
}

func TestPID1StopWhileDraining(t *testing.T) {
	t.Parallel()
	startPID1(t, nil, "serve").isStoppedWhileDraining()
}

func TestPID1MainProcessDiesWhileUpgrading(t *testing.T) {
	t.Parallel()
	b := startPID1(t, nil, "serve")
	first, child := b.isUpgrading()
	first.Order("die")
	b.log.Await("waiting for a new main process")
	b.signal(syscall.SIGTERM)
	b.log.Await("holding")
	proctest.OK(t, os.Remove(filepath.Join(b.dir, "hold")))
	b.log.Await("new main process", fmt.Sprint("pid=", child.PID))
	b.wantStatus(0)
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
				main.do("orphan")
			}
			var orphans []int
			proctest.AwaitThat(t, "they are the supervisor's", func() bool {
				orphans = proctest.ChildrenOf(b.pid)
				return len(orphans) == 4
			})
			self := proctest.Must(os.Readlink("/proc/self/exe"))
			for _, pid := range orphans { // of which some may be shells that have not executed sleep yet
				if program := proctest.Must(os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))); program != self {
					syscall.Kill(pid, syscall.SIGKILL)
				}
			}
			proctest.AwaitThat(t, "nothing is left of them", func() bool { return len(proctest.ChildrenOf(b.pid)) == 1 })
			main.do("environment")
		})
	}
}

// Before Linux 5.3, and where a sandbox forbids it, no process can be watched that another
// waits for.
func TestWithoutPidfds(t *testing.T) {
	t.Parallel()
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, 0, 0, 0); err != unix.EFAULT {
		t.Skipf("needs a kernel with seccomp filters: %v", err)
	}
	for _, errno := range []syscall.Errno{syscall.ENOSYS, syscall.EPERM} {
		t.Run(errno.Error(), func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			arguments := proctest.Arguments("without-pidfds", strconv.Itoa(int(errno)))
			b.start(command(append(arguments, superviseArguments([]string{"-stop", "1h"}, "puppet")...)))
			first := b.next()
			helper := first.spawn(b)
			second := first.upgrade(b)
			b.signal(syscall.SIGUSR1)
			second.wantSignals("SIGUSR1")
			second.Order("exit", "3")
			b.log.Await("main process ended")
			helper.wantSignals("SIGTERM")
			helper.Order("exit", "0")
			b.wantStatus(1) // because the status is not known
		})
	}
}

func init() {
	// The filter is that of this thread, and of the program that it executes. See seccomp(2).
	proctest.Role("without-pidfds", func() {
		runtime.LockOSThread()
		errno := proctest.Must(strconv.Atoi(os.Args[2]))
		filter := []unix.SockFilter{
			{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // the number of the system call
			{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_PIDFD_OPEN, Jf: 1},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		}
		program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		proctest.Must(0, unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		proctest.Must(0, unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0))
		proctest.Must(0, syscall.Exec(os.Args[3], os.Args[3:], os.Environ()))
	})
}

// While the old generation lives, it learns the new one's status, as its parent.
func TestMainProcessDiesBeforeItsParent(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	first := b.next()
	second := first.upgrade(b)
	second.Order("exit", "6")
	b.log.Await("main process ended")
	first.wantNoMoreSignals() // it may finish its drain
	first.Order("exit", "0")
	want := 6
	if !tellsExitStatus() {
		t.Log("before Linux 6.15, only the parent learns the status")
		want = 1
	}
	b.wantStatus(want)
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
	second.Order("exit", "3")
	helper.wantSignals("SIGTERM")
	first.wantNoMoreSignals()
	b.signal(syscall.SIGHUP) // means nothing to what is left
	b.signal(syscall.SIGTERM)
	first.wantSignals("SIGTERM")
	helper.wantSignals("SIGTERM")
	first.Order("exit", "0")
	first.AwaitEnd()
	helper.Order("exit", "0")
	b.log.Await("msg=ended")
}

func TestWhatDoesNotStopIsKilled(t *testing.T) {
	t.Parallel()
	b := startBed(t, []string{"-stop", "10ms"}, "puppet")
	first := b.next()
	second := first.spawn(b).spawn(b)
	first.Order("exit", "3")
	second.AwaitEnd()
	b.wantStatus(3)
}

// An older generation is killed if the service was told to stop, not if it has crashed.
func TestOlderGenerationIsKilled(t *testing.T) {
	t.Parallel()
	for _, told := range []bool{true, false} {
		t.Run(fmt.Sprint("told to stop: ", told), func(t *testing.T) {
			t.Parallel()
			b := startBed(t, []string{"-stop", "10ms", "-hurry", "1ms"}, "puppet")
			first := b.next()
			second := first.upgrade(b)
			stray := second.spawn(b)
			if told {
				b.signal(syscall.SIGTERM)
				second.wantSignals("SIGTERM")
			}
			second.Order("exit", "3")
			stray.AwaitEnd()
			b.log.Await("msg=ended")
			if told {
				first.AwaitEnd()
			} else {
				first.wantNoMoreSignals()
			}
		})
	}
}

// A zombie stays as long as somebody traces it.
func TestWhatCannotBeKilled(t *testing.T) {
	t.Parallel()
	b := startBed(t, []string{"-stop", "1ms", "-kill", "1ms"}, "puppet")
	main := b.next()
	helper := main.spawn(b)
	trace(t, helper.PID)
	b.signal(syscall.SIGTERM)
	main.wantSignals("SIGTERM")
	main.Order("exit", "3")
	b.log.Await("can't kill what is left")
	b.wantStatus(3)
}

// trace traces a process until the end of the test.
func trace(t *testing.T, pid int) {
	t.Helper()
	traced, done := make(chan error, 1), make(chan struct{})
	go func() {
		runtime.LockOSThread() // the tracer, which ends with this goroutine
		traced <- unix.PtraceSeize(pid)
		<-done
	}()
	t.Cleanup(func() { close(done) })
	if err := <-traced; errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
		t.Skipf("needs to be allowed to trace its own processes: %v", err)
	} else {
		proctest.OK(t, err)
	}
}

// A PID that was a main process's is nobody's in particular when another process has got it.
func TestPIDIsUsedAgain(t *testing.T) {
	t.Parallel()
	for _, reaps := range []string{"supervisor", "older generation"} {
		t.Run(reaps, func(t *testing.T) {
			t.Parallel()
			b := startPID1(t, nil, "puppet")
			first := b.next()
			former := first.upgrade(b) // because first's PID is that of the process group, too
			if reaps == "supervisor" {
				first.Order("exit", "0")
				former.do("outlive", strconv.Itoa(first.PID))
			}
			main := former.upgrade(b)
			former.Order("exit", "0")
			main.do("outlive", strconv.Itoa(former.PID))
			if reaps != "supervisor" {
				main = main.upgrade(b) // when the supervisor looks who is left
			}
			main.do("respawn", strconv.Itoa(former.PID))
			helper := b.next()
			if helper.PID != former.PID {
				t.Skipf("got the PID %d, wanted %d", helper.PID, former.PID)
			}
			main.Order("exit", "0")
			helper.wantSignals("SIGTERM")
		})
	}
}

func TestTakeoverByNobody(t *testing.T) {
	t.Parallel()
	b := startBed(t, []string{"-takeover", "1h"}, "puppet")
	first := b.next()
	second := first.upgrade(b)
	second.beginUpgrade()
	third := second.spawn(b)
	second.Order("exit", "3")
	b.log.Await("waiting for a new main process")
	b.signal(syscall.SIGTERM)
	b.log.Await("holding", "SIGTERM")
	third.Order("exit", "0") // no other process is left that could
	b.log.Await("nobody is left")
	first.wantSignals("SIGTERM")
	first.Order("exit", "0")
	first.AwaitEnd()
	b.log.Await("msg=ended")
}

// A part of the service that upgrades itself is not the service.
func TestOnlyTheMainProcessHandsOver(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	part := main.spawn(b)
	next := part.spawn(b)
	part.do("notify", fmt.Sprintf("MAINPID=%d\nREADY=1", next.PID))
	part.barrier()
	b.signal(syscall.SIGUSR1)
	main.wantSignals("SIGUSR1")
	next.wantNoMoreSignals()
}

// A signal that arrives together with a MAINPID is for the new main process.
func TestSignalsMeetHandOvers(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	for range 5 {
		child := main.spawn(b)
		proctest.Suspend(t, b.pid)
		main.do("notify", fmt.Sprintf("MAINPID=%d", child.PID))
		b.signal(syscall.SIGUSR1)
		b.signal(syscall.SIGCONT)
		child.wantBothSignals("SIGUSR1", "SIGCONT")
		main.wantNoMoreSignals()
		main = child
	}
}

// A signal that arrives when the main process has begun to die waits for the next one.
func TestSignalsMeetDeaths(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	for range 5 {
		main.beginUpgrade()
		child := main.spawn(b)
		main.barrier()
		main.Order("exit", "0")
		b.signal(syscall.SIGHUP)
		child.do("notify", fmt.Sprintf("MAINPID=%d\nREADY=1", child.PID))
		child.wantSignals("SIGHUP")
		child.wantNoMoreSignals()
		main = child
	}
}

// The service gets nothing that is the supervisor's.
func TestServiceInheritsNothing(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	supervisors := openSockets(t, b.pid)
	if len(supervisors) == 0 {
		t.Error("the supervisor has no socket")
	}
	for socket := range openSockets(t, main.PID) {
		if supervisors[socket] {
			t.Errorf("the service has the supervisor's %s", socket)
		}
	}
}

func openSockets(t *testing.T, pid int) map[string]bool {
	t.Helper()
	sockets := map[string]bool{}
	dir := fmt.Sprintf("/proc/%d/fd/", pid)
	for _, fd := range proctest.Must(os.ReadDir(dir)) {
		if file, err := os.Readlink(dir + fd.Name()); err == nil && strings.HasPrefix(file, "socket:") {
			sockets[file] = true
		}
	}
	return sockets
}

// A PID file may name a main process that has ended, and is there still.
func TestPIDFileOpensNoDescriptors(t *testing.T) {
	t.Parallel()
	pidFile := filepath.Join(t.TempDir(), "pid")
	b := startBed(t, []string{"-pid-file", pidFile}, "puppet")
	first := b.next()
	second := first.upgrade(b, "unreaped")
	proctest.OK(t, os.WriteFile(pidFile, fmt.Append(nil, second.PID), 0o644))
	second.beginUpgrade()
	third := second.spawn(b)
	second.Order("die")
	b.log.Await("waiting for a new main process")
	third.do("notify", fmt.Sprintf("MAINPID=%d\nREADY=1", third.PID))
	third.barrier()
	proctest.AwaitThat(t, "one process is watched", func() bool {
		watched := 0
		for _, file := range proctest.OpenFiles(t, b.pid) {
			if strings.Contains(file, "pidfd") {
				watched++
			}
		}
		return watched == 1
	})
}

func brokenProgram(t *testing.T) string {
	t.Helper()
	broken := filepath.Join(t.TempDir(), "broken")
	proctest.OK(t, os.WriteFile(broken, []byte("#!/nowhere/interpreter\n"), 0o755))
	return broken
}

// After an error of Self its caller may go on without a supervisor, and is no reaper.
func TestNotStartedIsNoReaper(t *testing.T) {
	broken := brokenProgram(t)
	before := openSockets(t, os.Getpid())
	if _, err := (supervise.Supervisor{Command: []string{broken}}).Run(); err == nil {
		t.Fatal("started")
	}
	for socket := range openSockets(t, os.Getpid()) {
		if !before[socket] {
			t.Errorf("%s is still open", socket)
		}
	}
	var isReaper int32
	if err := unix.Prctl(unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&isReaper)), 0, 0, 0); err != nil || isReaper != 0 {
		t.Errorf("reaper: %d, %v", isReaper, err)
	}
}

// Nor does it go on to catch signals.
func TestNotStartedCatchesNothing(t *testing.T) {
	s := proctest.NewService(t)
	cmd := s.Command("goes-on", proctest.WithArg(brokenProgram(t)))
	err := cmd.Run()
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !status.Signaled() || status.Signal() != syscall.SIGTERM {
		t.Errorf("it has ended with %v, want by SIGTERM", err)
	}
	if got := s.Await("goroutines").Text; got != "false" {
		t.Error("there are more goroutines than before")
	}
}

func init() {
	proctest.Role("goes-on", func() {
		try := func() {
			if _, err := (supervise.Supervisor{Command: []string{proctest.Arg()}}).Run(); err == nil {
				panic("started")
			}
		}
		try() // package os/signal starts one for ever
		before := runtime.NumGoroutine()
		try()
		for end := time.Now().Add(proctest.Patience); runtime.NumGoroutine() > before && time.Now().Before(end); {
			time.Sleep(time.Millisecond) // a poll
		}
		proctest.Report("goroutines", runtime.NumGoroutine() > before)
		proctest.Must(0, syscall.Kill(os.Getpid(), syscall.SIGTERM))
		<-time.After(proctest.Patience)
	})
}

// A program whose service Self could not start goes on.
func TestSelfNotStarted(t *testing.T) {
	status, output, stderr := proctest.Run(t, "self-goes-on", brokenProgram(t))
	if status != 0 || !strings.Contains(output, "can't start the service") {
		t.Errorf("exit status %d, %q, %q", status, output, stderr)
	}
}

func init() {
	proctest.Role("self-goes-on", func() {
		os.Args[0] = os.Args[1]
		fmt.Println(supervise.Self())
	})
}

// Messages count that a process sent before it died.
func TestLastWords(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	for name, handOver := range map[string]func(from, to *puppet) error{
		"message": func(from, to *puppet) error {
			from.do("notify", fmt.Sprintf("MAINPID=%d", to.PID))
			return nil
		},
		"PID file": func(_, to *puppet) error { return os.WriteFile(pidFile, fmt.Append(nil, to.PID), 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			b := startBed(t, []string{"-pid-file", pidFile}, "puppet")
			first := b.next()
			second := first.spawn(b)
			proctest.Suspend(t, b.pid)
			proctest.OK(t, handOver(first, second))
			first.Order("exit", "0")
			first.AwaitEnd()
			second.Order("exit", "9")
			second.AwaitEnd()
			b.signal(syscall.SIGCONT)
			b.wantStatus(9)
		})
	}
}

// The messages of a main process count that its parent has waited for since.
func TestLastWordsOfAGrandchild(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	first := b.next()
	second := first.upgrade(b)
	proctest.Suspend(t, b.pid)
	second.do("notify", "STOPPING=1")
	second.Order("exit", "0")
	awaitNobody(t, second.PID)
	b.signal(syscall.SIGCONT)
	b.log.Await("msg=stopping", fmt.Sprint("pid=", second.PID))
	first.Order("exit", "0")
	b.wantStatus(0)
}

// awaitNobody waits until a process has been waited for.
func awaitNobody(t *testing.T, pid int) {
	t.Helper()
	proctest.AwaitThat(t, "it has been waited for", func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH })
}

func TestLogIsNotRead(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	read, write, err := os.Pipe()
	proctest.OK(t, err)
	read.Close()
	defer write.Close()
	cmd := supervisor(nil, "puppet")
	cmd.Stderr = write
	b.run(cmd)
	main := b.next()
	b.signal(syscall.SIGTERM)
	main.wantSignals("SIGTERM")
	main.Order("exit", "8")
	b.wantStatus(8)
}

// A manager stands in for the one that has started the supervisor, and is notified.
type manager struct {
	*net.UnixConn
	t       *testing.T
	address string
}

func newManager(b *bed) manager {
	b.t.Helper()
	address := filepath.Join(b.dir, "notify")
	conn := proctest.Opened[*net.UnixConn](b.t)(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"}))
	return manager{conn, b.t, address}
}

// environment returns the variable for the supervisor.
func (m manager) environment() string { return "NOTIFY_SOCKET=" + m.address }

// wantMessage expects these fields, and no message before them.
func (m manager) wantMessage(fields ...string) {
	m.t.Helper()
	text := make([]byte, 1000)
	m.SetReadDeadline(time.Now().Add(proctest.Patience))
	n, err := m.Read(text)
	if want := strings.Join(fields, "\n"); err != nil || string(text[:n]) != want {
		m.t.Fatalf("got %q, %v, want %q", text[:n], err, want)
	}
}

// await reads until there is a message that begins with this.
func (m manager) await(prefix string) {
	m.t.Helper()
	text := make([]byte, 1000)
	m.SetReadDeadline(time.Now().Add(proctest.Patience))
	for !strings.HasPrefix(string(text), prefix) {
		_, err := m.Read(text)
		proctest.OK(m.t, err)
	}
}

func TestPassesOn(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	outer := newManager(b)
	cmd := supervisor(nil, "puppet")
	cmd.Env = append(os.Environ(), outer.environment(), "WATCHDOG_PID=1", "WATCHDOG_USEC=2")
	b.start(cmd)
	wantPassedOn := func(fields ...string) {
		t.Helper()
		outer.wantMessage(append(fields, fmt.Sprint("MAINPID=", b.pid))...)
	}
	first := b.next()
	if first.do("environment", "NOTIFY_SOCKET") == outer.address || first.do("environment", "WATCHDOG_PID") != "" || first.do("environment", "WATCHDOG_USEC") != "2" {
		t.Error("the service's environment is the supervisor's")
	}
	first.do("notify", "STATUS=a=b\nREADY=1\nFDSTORE=1")
	wantPassedOn("READY=1", "STATUS=a=b")
	second := first.upgrade(b)
	wantPassedOn("RELOADING=1", "MONOTONIC_USEC=1")
	wantPassedOn("READY=1", "STATUS=")
	first.do("notify", "STOPPING=1") // no longer its business
	first.do("notify", "STATUS=old")
	second.do("notify", "FDSTORE=1") // nor this
	second.do("notify", "WATCHDOG=1")
	wantPassedOn("WATCHDOG=1")
	second.do("notify", "RELOADING=1\nMONOTONIC_USEC=2")
	wantPassedOn("RELOADING=1", "MONOTONIC_USEC=2")
	third := second.spawn(b)
	second.Order("die")
	third.do("notify", fmt.Sprintf("MAINPID=%d\nREADY=1", third.PID))
	wantPassedOn("READY=1")
	third.do("notify", "STOPPING=1")
	wantPassedOn("STOPPING=1")
}

func TestSocketActivation(t *testing.T) {
	t.Parallel()
	for _, role := range []string{"supervise", "self"} {
		b := newBed(t)
		arguments := proctest.Arguments("self")
		if role == "supervise" {
			arguments = superviseArguments(nil, "puppet")
		}
		socket, err := os.CreateTemp(b.dir, "")
		proctest.OK(t, err)
		defer socket.Close()
		cmd := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@"`}, arguments...)...)
		other := proctest.Opened[*os.File](t)(os.CreateTemp(b.dir, ""))
		cmd.ExtraFiles = []*os.File{socket, other}
		b.start(cmd)
		main := b.next()
		if got := main.do("environment", "TABLEFLIP_SUPERVISOR_EXEC"); got != "" {
			t.Errorf("%s: left in the environment: %s", role, got)
		}
		if got := main.do("environment", "LISTEN_PID"); got != strconv.Itoa(main.PID) {
			t.Errorf("%s: LISTEN_PID=%s in process %d", role, got, main.PID)
		}
		if got, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/3", main.PID)); got != socket.Name() {
			t.Errorf("%s: got %s, %v", role, got, err)
		}
		if got, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/3", b.pid)); got == socket.Name() {
			t.Errorf("%s: the supervisor keeps it open: %v", role, err)
		}
		if got, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/4", b.pid)); got != other.Name() {
			t.Errorf("%s: the supervisor has closed what is no socket of its own: %s, %v", role, got, err)
		}
		main.Order("exit", "0")
		b.wantStatus(0)
	}
}

// Sockets that something in between has passed on are not the service's own.
func TestSocketActivationOfAnother(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	arguments := append(proctest.Arguments("supervise"), "--", "/bin/sh", "-c", `LISTEN_FDS=1 LISTEN_PID=1 exec "$0" "$@"`)
	b.start(command(append(arguments, proctest.Arguments("self")...)))
	if got := b.next().do("environment", "LISTEN_PID"); got != "1" {
		t.Errorf("LISTEN_PID=%s, want 1", got)
	}
}

// The supervisor closes no sockets that are not its own by LISTEN_PID.
func TestSocketActivationOfNobody(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	cmd := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_FDS=1 LISTEN_PID=1 exec "$0" "$@"`}, superviseArguments(nil, "puppet")...)...)
	file := proctest.Opened[*os.File](t)(os.CreateTemp(b.dir, ""))
	cmd.ExtraFiles = []*os.File{file}
	b.start(cmd)
	main := b.next()
	if got := main.do("environment", "LISTEN_PID"); got != "1" {
		t.Errorf("LISTEN_PID=%s, want 1", got)
	}
	if got, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/3", b.pid)); got != file.Name() {
		t.Errorf("the supervisor has closed what is not for it: %s, %v", got, err)
	}
}

// A process that polls wakes up. The bound is a wake-up every 50 milliseconds; two in a
// minute were measured. A suspended process, too, wakes up when it is continued.
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
	proctest.AwaitThat(t, "a second with at most 20 wake-ups", func() bool {
		before := wakeUps()
		time.Sleep(time.Second) // what is measured
		after := wakeUps()
		t.Logf("woke up %d times in a second, %d before", after-before, before)
		return before > 0 && after-before <= 20
	})
}

func TestSupervisorOpensNoDescriptors(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	current := b.next()
	helper := current.spawn(b)
	count := func() int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", b.pid))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return len(entries)
	}
	turn := func() {
		child := current.upgrade(b)
		current.Order("exit", "0")
		current.AwaitEnd()
		current = child
		current.do("attach", "FDSTORE=1")
		// What is ignored.
		current.do("notify", fmt.Sprint("MAINPID=", os.Getpid()))
		current.do("notify", fmt.Sprint("MAINPID=", current.PID))
		helper.do("notify", fmt.Sprint("MAINPID=", helper.PID))
		helper.barrier()
	}
	turn()
	before := count()
	for range 3 {
		turn()
	}
	current.barrier()
	// A goroutine closes that of the last main process.
	proctest.AwaitThat(t, fmt.Sprintf("%d descriptors are open, as before", before), func() bool { return count() <= before })
}
