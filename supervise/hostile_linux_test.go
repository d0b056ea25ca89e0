package supervise_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
)

// These tests are about processes that mean harm, do not read, or break the rules.

// keepsMain checks that main is the main process still, and not another.
func (b *bed) keepsMain(main, other *puppet) {
	b.t.Helper()
	main.barrier()
	b.signal(syscall.SIGUSR1)
	main.wantSignals("SIGUSR1")
	other.wantNoMoreSignals()
}

func TestStrangerIsIgnored(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	other := main.spawn(b)
	address, claim := main.do("environment", "NOTIFY_SOCKET"), fmt.Sprintf("MAINPID=%d", other.PID)
	main.beginUpgrade()
	for range 1000 {
		notify(address, claim)
	}
	b.keepsMain(main, other)
	messages := 1000
	if os.Getuid() == 0 {
		messages++
		stranger := command(proctest.Arguments("stranger", address, claim))
		if output, err := stranger.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, output)
		}
		b.keepsMain(main, other)
	} else {
		t.Log("needs root to send as another user")
	}
	other.Order("exit", "0")
	other.AwaitEnd()
	main.Order("exit", "0")
	b.wantIgnored(messages)
}

// wantIgnored waits for the end, until when so many messages must have been ignored. The
// log tells of the first at once, and of the others together.
func (b *bed) wantIgnored(messages int) {
	b.t.Helper()
	var counts []int
	for all := 0; all < messages; {
		_, text, _ := strings.Cut(b.log.Await("ignored messages", "strangers"), "count=")
		n := 0
		fmt.Sscan(text, &n)
		counts, all = append(counts, n), all+n
		if all > messages {
			b.t.Errorf("ignored %d messages, want %d", counts, messages)
		}
	}
	b.log.Await("msg=ended")
	records := b.log.Count("ignored messages")
	if counts[0] != 1 || records != len(counts) || records > messages/2 { // one is added each minute
		b.t.Errorf("ignored %d messages in %d records, want 1 at first, and then %d", counts, records, messages-1)
	}
}

// The main process cannot hand over to one that is not the service's.
func TestStrangerIsNotFollowed(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	other := main.spawn(b)
	main.do("notify", fmt.Sprint("MAINPID=", startSleeper(b)))
	b.keepsMain(main, other)
	b.log.Await("ignored MAINPID", "no process of the service")
}

// Where /proc says nothing, no number is taken for a process that means several, or the
// supervisor itself, or the first process.
func TestForeignProcMainPID(t *testing.T) {
	t.Parallel()
	// The supervisor must not be the first process.
	shell := []string{"-p", "-f", "sh", "-c", `"$@"; exit $?`, "sh"}
	b := startUnshared(t, shell, superviseArguments(nil, "puppet"))
	main := b.next()
	for _, pid := range []string{main.do("parent"), "x", "-1", "0", "1", "4294967295"} {
		main.do("notify", "MAINPID="+pid)
		b.log.Await("ignored MAINPID", "no process of the service", "value="+pid)
	}
	main.Order("exit", "5")
	b.wantStatus(5)
}

// While the main process lives, nobody hands over for it, not even for later.
func TestOnlyClaimsOfOwnCount(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.beginUpgrade()
	child := main.spawn(b)
	part := main.spawn(b)
	next := part.spawn(b)
	part.do("notify", fmt.Sprint("MAINPID=", next.PID))
	part.barrier()
	main.Order("die")
	b.log.Await("waiting for a new main process")
	child.do("notify", fmt.Sprint("MAINPID=", child.PID))
	b.keepsMain(child, next)
}

// Of those who claim to be the main process again and again, some claims count.
func TestClaimsAreLimited(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.beginUpgrade()
	child := main.spawn(b)
	other := main.spawn(b)
	for range 20 {
		other.do("notify", fmt.Sprint("MAINPID=", other.PID))
	}
	other.barrier()
	other.Order("exit", "0")
	awaitNobody(t, other.PID)
	main.Order("die")
	b.log.Await("waiting for a new main process")
	child.Order("exit", "0")
	b.wantIgnored(16) // because the process has ended
}

func init() {
	proctest.Role("stranger", func() {
		proctest.Must(0, syscall.Setuid(65534))
		notify(os.Args[2], os.Args[3])
	})
}

// To the supervisor, a process in another PID namespace has PID 0.
func TestStrangerOfAnotherPIDNamespace(t *testing.T) {
	t.Parallel()
	b := startPID1(t, nil, "puppet")
	main := b.next()
	other := main.spawn(b)
	address := main.do("environment", "NOTIFY_SOCKET")
	notify(address, fmt.Sprintf("MAINPID=%d", other.PID))
	main.barrier()
	b.signal(syscall.SIGUSR1)
	main.wantSignals("SIGUSR1")
	b.log.Await("ignored messages", "strangers")
	notify(address, "STOPPING=1")
	main.barrier()
	if n := b.log.Count("msg=stopping"); n != 0 {
		t.Error("a stranger has said that the service stops")
	}
}

func TestLongMessageIsIgnored(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	other := main.spawn(b)
	main.do("notify", fmt.Sprintf("MAINPID=%d\nSTATUS=%s", other.PID, strings.Repeat("x", 5000)))
	b.keepsMain(main, other)
	b.log.Await("ignored messages", "too long")
}

// The pipe of the log is full, and nobody reads it.
func TestFullLogHoldsNothing(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	read, write, err := os.Pipe()
	proctest.OK(t, err)
	defer write.Close()
	fill(t, write, strings.Repeat("x", 1<<16))
	cmd := supervisor(nil, "puppet")
	cmd.Stderr = blocking(t, write)
	b.run(cmd)
	main := b.next()
	for range 400 { // more records than are kept
		b.signal(syscall.SIGUSR1)
		main.wantSignals("SIGUSR1")
	}
	child := main.upgrade(b)
	b.signal(syscall.SIGTERM)
	child.wantSignals("SIGTERM")
	go b.log.Read(read)
	b.log.Await("records are missing")
	main.Order("exit", "0")
	main.AwaitEnd()
	child.Order("exit", "8")
	b.wantStatus(8)
}

// fill writes until nothing fits any more. to must not block.
func fill(t *testing.T, to syscall.Conn, text string) {
	t.Helper()
	raw, err := to.SyscallConn()
	proctest.OK(t, err)
	for err == nil {
		controlErr := raw.Control(func(fd uintptr) { _, err = unix.Write(int(fd), []byte(text)) })
		proctest.OK(t, controlErr)
	}
	proctest.WantError(t, "the last write", err, unix.EAGAIN)
}

// blocking returns the same pipe, opened anew, as programs are given it.
func blocking(t *testing.T, pipe *os.File) *os.File {
	t.Helper()
	raw, err := pipe.SyscallConn()
	proctest.OK(t, err)
	var fd int
	raw.Control(func(old uintptr) {
		fd, err = unix.Open(fmt.Sprintf("/proc/self/fd/%d", old), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	})
	proctest.OK(t, err)
	file := os.NewFile(uintptr(fd), "blocking")
	t.Cleanup(func() { file.Close() })
	return file
}

// Nor does it hold up the end.
func TestFullLogEnds(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	read, write, err := os.Pipe()
	proctest.OK(t, err)
	defer read.Close()
	defer write.Close()
	fill(t, write, strings.Repeat("x", 1<<16))
	cmd := supervisor(nil, "puppet")
	cmd.Stderr = blocking(t, write)
	b.run(cmd)
	b.next().Order("exit", "8")
	b.wantStatus(8)
}

func TestFullOuterSocketHoldsNothing(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	outer := newManager(b)
	filler := proctest.Opened[*net.UnixConn](t)(net.DialUnix("unixgram", nil, &net.UnixAddr{Name: outer.address, Net: "unixgram"}))
	fill(t, filler, "x")
	cmd := supervisor(nil, "puppet")
	cmd.Env = append(os.Environ(), outer.environment())
	b.start(cmd)
	main := b.next()
	for i := range 40 { // more than are kept
		main.do("notify", fmt.Sprint("STATUS=", i))
		main.barrier()
	}
	b.signal(syscall.SIGUSR1)
	main.wantSignals("SIGUSR1")
	b.log.Await("NOTIFY_SOCKET is not read")

	// The last is what counts.
	outer.await("STATUS=39\n")

	// Nor does it hold up the end.
	fill(t, filler, "x")
	for range 20 {
		main.do("notify", "STATUS=")
	}
	main.Order("exit", "8")
	b.wantStatus(8)
}

// The end waits for the last message.
func TestLastMessageIsPassedOn(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	outer := newManager(b)
	filler := proctest.Opened[*net.UnixConn](t)(net.DialUnix("unixgram", nil, &net.UnixAddr{Name: outer.address, Net: "unixgram"}))
	fill(t, filler, "x")
	cmd := supervisor([]string{"-flush", proctest.Patience.String()}, "puppet")
	cmd.Env = append(os.Environ(), outer.environment())
	b.start(cmd)
	main := b.next()
	main.do("notify", "STATUS=last")
	main.barrier()
	main.Order("exit", "8")
	b.log.Await("msg=ended")
	select {
	case <-b.reaped:
		t.Fatal("the supervisor has ended, and has not passed the last message on")
	case <-time.After(50 * time.Millisecond):
	}
	outer.await("STATUS=last\n")
	b.wantStatus(8)
}

// A message that was passed on leaves nothing behind.
func TestPassingOnLeavesNoDescriptor(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	outer := newManager(b)
	cmd := supervisor(nil, "puppet")
	cmd.Env = append(os.Environ(), outer.environment())
	b.start(cmd)
	main := b.next()
	passOn := func() int {
		main.do("notify", "STATUS=x")
		outer.await("STATUS=x\n")
		return len(proctest.Must(os.ReadDir(fmt.Sprintf("/proc/%d/fd", b.pid))))
	}
	limit := passOn() + 3 // because some are open for a moment
	for range 10 {
		passOn()
	}
	proctest.AwaitThat(t, fmt.Sprint("at most ", limit, " descriptors are open"), func() bool { return passOn() <= limit })
}

// The main process has ended, and its parent does not wait for it.
func TestUnreapedHasEnded(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	first := b.next()
	second := first.upgrade(b, "unreaped")
	second.Order("die")
	b.log.Await("main process ended", fmt.Sprint("pid=", second.PID))
}

// The main process has handed over, and could not say so.
func TestUnannouncedIsFollowed(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	first := b.next()
	helper := first.spawn(b)
	second := first.spawn(b)
	part := second.spawn(b)
	second.do("listen")
	part.do("listen")
	first.Order("exit", "0")
	b.log.Await("nobody has announced", fmt.Sprint("pid=", second.PID))
	b.signal(syscall.SIGUSR1)
	second.wantSignals("SIGUSR1")
	part.wantNoMoreSignals()
	helper.wantNoMoreSignals()
	second.Order("exit", "7")
	part.wantSignals("SIGTERM")
	helper.wantSignals("SIGTERM")
	for _, p := range []*puppet{part, helper} {
		p.Order("exit", "0")
		p.AwaitEnd()
	}
	b.wantStatus(7)
}

// A process that listens is no successor if the main process was told to stop, has said
// that it stops, or has crashed.
func TestUnannouncedIsNot(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		before func(*bed, *puppet)
		exit   int
	}{
		"told": {func(b *bed, main *puppet) {
			b.signal(syscall.SIGTERM)
			main.wantSignals("SIGTERM")
		}, 0},
		"stops":   {func(_ *bed, main *puppet) { main.do("notify", "STOPPING=1") }, 0},
		"crashed": {func(*bed, *puppet) {}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			b := startBed(t, nil, "puppet")
			main := b.next()
			helper := main.spawn(b)
			helper.do("listen")
			test.before(b, main)
			main.Order("exit", fmt.Sprint(test.exit))
			helper.wantSignals("SIGTERM")
			helper.Order("exit", "0")
			b.wantStatus(test.exit)
		})
	}
}

// If a main process ends during an upgrade, that is no success.
func TestUnfinishedUpgradeIsNoSuccess(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.beginUpgrade()
	main.Order("exit", "0")
	b.wantStatus(1)
}

// The service is down, and is restarted only when the supervisor has ended.
func TestCrashDoesNotWaitForDraining(t *testing.T) {
	t.Parallel()
	for _, hangs := range []bool{false, true} {
		t.Run(fmt.Sprint("older generation hangs: ", hangs), func(t *testing.T) {
			b := startBed(t, []string{"-stop", "1h", "-hurry", "1ms"}, "puppet")
			first := b.next()
			helper := first.spawn(b)
			second := first.upgrade(b)
			stray := second.spawn(b)
			second.Order("exit", "3")
			stray.wantSignals("SIGTERM")
			helper.wantSignals("SIGTERM")
			stray.Order("exit", "0")
			stray.AwaitEnd()
			for began := time.Now(); time.Since(began) < 20*time.Millisecond; {
				first.barrier() // the helper has its time
			}
			if hangs { // and does not wait for its children
				proctest.Suspend(t, first.PID)
			}
			helper.Order("exit", "0") // of which nobody tells the supervisor
			b.log.Await("not waiting for older generations")
			b.log.Await("msg=ended")
			if !hangs { // else the kernel continues it: its group is nobody's
				first.wantNoMoreSignals()
			}
		})
	}
}

// If the supervisor is process 1, all processes end with it.
func TestPID1Crash(t *testing.T) {
	t.Parallel()
	b := startPID1(t, []string{"-stop", "1h"}, "puppet")
	first := b.next()
	second := first.upgrade(b)
	second.Order("exit", "3")
	first.AwaitEnd()
	b.log.Await("not waiting for older generations")
	if b.awaitStatus() == 0 {
		t.Error("exit status 0")
	}
}

func TestStopWaitsForDraining(t *testing.T) {
	t.Parallel()
	for name, stop := range map[string]func(*bed, *puppet){
		"told": func(b *bed, main *puppet) {
			b.signal(syscall.SIGTERM)
			main.wantSignals("SIGTERM")
		},
		"stops": func(_ *bed, main *puppet) { main.do("notify", "STOPPING=1") },
	} {
		t.Run(name, func(t *testing.T) {
			b := startBed(t, []string{"-hurry", "1ms"}, "puppet")
			first := b.next()
			second := first.upgrade(b)
			stop(b, second)
			second.Order("exit", "0")
			b.log.Await("waiting for what is left")
			for began := time.Now(); time.Since(began) < 50*time.Millisecond; {
				first.barrier()
			}
			first.wantNoMoreSignals()
			first.Order("exit", "0")
			first.AwaitEnd()
			b.log.Await("msg=ended")
			if n := b.log.Count("not waiting"); n != 0 {
				t.Error("it has not waited")
			}
		})
	}
}

func TestActivatedServiceIsNotStarted(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	broken := filepath.Join(b.dir, "broken")
	proctest.OK(t, os.WriteFile(broken, []byte("#!/nowhere/interpreter\n"), 0o755))
	b.start(exec.Command("/bin/sh", append([]string{"-c", `LISTEN_FDS=0 LISTEN_PID=$$ exec "$0" "$@"`}, proctest.Arguments("supervise", "--", broken)...)...))
	b.log.Await("can't start the service", broken)
	b.wantStatus(127)
}
