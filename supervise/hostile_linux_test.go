package supervise_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// These are about those who mean harm, do not listen, or do not know better.

// keepsMain checks that main is the main process still, and not another.
func (b *bed) keepsMain(main, other *puppet) {
	b.t.Helper()
	main.barrier()
	b.signal(syscall.SIGUSR1)
	main.gets("SIGUSR1")
	other.getsNoMore()
}

func TestStrangerIsIgnored(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	other := main.spawn(b)
	claim := fmt.Sprintf("MAINPID=%d", other.pid)
	main.do("notify", "RELOADING=1\nMONOTONIC_USEC=1")
	for range 1000 {
		notify(main.address, claim)
	}
	b.keepsMain(main, other)
	b.log.await("ignored messages", "strangers")

	if os.Getuid() == 0 {
		stranger := exec.Command(os.Args[0], "stranger", main.address, claim)
		if output, err := stranger.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, output)
		}
		b.keepsMain(main, other)
	} else {
		t.Log("needs root to send as another user")
	}
	other.tell("exit", "0")
	other.ends()
	main.tell("exit", "0")
	b.log.await("msg=ended")
	// The first, and the rest.
	if n := b.log.count("ignored messages"); n != 2 {
		t.Errorf("logged %d times", n)
	}
}

func init() {
	roles["stranger"] = func(arguments []string) {
		must(0, syscall.Setuid(65534))
		notify(arguments[0], arguments[1])
	}
}

// To the supervisor, whoever is in another PID namespace is process 0.
func TestStrangerOfAnotherPIDNamespace(t *testing.T) {
	t.Parallel()
	b := startPID1(t, nil, "puppet")
	main := b.next()
	other := main.spawn(b)
	notify(main.address, fmt.Sprintf("MAINPID=%d", other.pid))
	main.barrier()
	b.signal(syscall.SIGUSR1)
	main.gets("SIGUSR1")
	b.log.await("ignored messages", "strangers")
	notify(main.address, "STOPPING=1")
	main.barrier()
	if n := b.log.count("msg=stopping"); n != 0 {
		t.Error("a stranger has said that the service stops")
	}
}

func TestLongMessageIsIgnored(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	other := main.spawn(b)
	main.do("notify", fmt.Sprintf("MAINPID=%d\nSTATUS=%s", other.pid, strings.Repeat("x", 5000)))
	b.keepsMain(main, other)
	b.log.await("ignored messages", "too long")
}

// The pipe of the log is full, and nobody reads it.
func TestFullLogHoldsNothing(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer write.Close()
	fill(write, strings.Repeat("x", 1<<16))
	cmd := exec.Command(os.Args[0], superviseArguments(nil, []string{"puppet"})...)
	cmd.Stderr = blocking(t, write)
	b.run(cmd)
	main := b.next()
	for range 400 { // more records than are kept
		b.signal(syscall.SIGUSR1)
		main.gets("SIGUSR1")
	}
	child := main.upgrade(b)
	b.signal(syscall.SIGTERM)
	child.gets("SIGTERM")
	go b.log.read(read)
	b.log.await("records are missing")
	main.tell("exit", "0")
	main.ends()
	child.tell("exit", "8")
	b.ends(8)
}

// fill writes until nothing fits any more.
func fill(to interface {
	io.Writer
	SetWriteDeadline(time.Time) error
}, text string) {
	for err := error(nil); err == nil; {
		to.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
		_, err = io.WriteString(to, text)
	}
}

// blocking returns the same pipe, opened anew, as programs are given it.
func blocking(t *testing.T, pipe *os.File) *os.File {
	t.Helper()
	raw, err := pipe.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var fd int
	raw.Control(func(old uintptr) {
		fd, err = unix.Open(fmt.Sprintf("/proc/self/fd/%d", old), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "blocking")
	t.Cleanup(func() { file.Close() })
	return file
}

// Nor does it hold up the end.
func TestFullLogEnds(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	fill(write, strings.Repeat("x", 1<<16))
	cmd := exec.Command(os.Args[0], superviseArguments(nil, []string{"puppet"})...)
	cmd.Stderr = blocking(t, write)
	b.run(cmd)
	b.next().tell("exit", "8")
	b.ends(8)
}

func TestFullOuterSocketHoldsNothing(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	address := filepath.Join(b.dir, "notify")
	outer, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer outer.Close()
	filler, err := net.Dial("unixgram", address)
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	fill(filler, "x")
	cmd := exec.Command(os.Args[0], superviseArguments(nil, []string{"puppet"})...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+address)
	b.start(cmd)
	main := b.next()
	for i := range 40 { // more than are kept
		main.do("notify", fmt.Sprint("STATUS=", i))
		main.barrier()
	}
	b.signal(syscall.SIGUSR1)
	main.gets("SIGUSR1")
	b.log.await("NOTIFY_SOCKET is not read")

	// The last is what counts.
	text := make([]byte, 1000)
	outer.SetReadDeadline(time.Now().Add(patience))
	for !strings.HasPrefix(string(text), "STATUS=39\n") {
		if _, err := outer.Read(text); err != nil {
			t.Fatal(err)
		}
	}

	// Nor does it hold up the end.
	fill(filler, "x")
	for range 20 {
		main.do("notify", "STATUS=")
	}
	main.tell("exit", "8")
	b.ends(8)
}

// The main process has handed over, and could not say so.
func TestUnannouncedIsFollowed(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	first := b.next()
	helper := first.spawn(b)
	second := first.spawn(b)
	part := second.spawn(b)
	second.do("listen", "")
	part.do("listen", "")
	first.tell("exit", "0")
	b.log.await("nobody has announced", fmt.Sprint("pid=", second.pid))
	b.signal(syscall.SIGUSR1)
	second.gets("SIGUSR1")
	part.getsNoMore()
	helper.getsNoMore()
	second.tell("exit", "7")
	part.gets("SIGTERM")
	helper.gets("SIGTERM")
	for _, p := range []*puppet{part, helper} {
		p.tell("exit", "0")
		p.ends()
	}
	b.ends(7)
}

// What listens is no successor of a main process that was told to stop, has said
// that it stops, or has crashed.
func TestUnannouncedIsNot(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		before func(*bed, *puppet)
		exit   int
	}{
		"told": {func(b *bed, main *puppet) {
			b.signal(syscall.SIGTERM)
			main.gets("SIGTERM")
		}, 0},
		"stops":   {func(_ *bed, main *puppet) { main.do("notify", "STOPPING=1") }, 0},
		"crashed": {func(*bed, *puppet) {}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			b := startBed(t, nil, "puppet")
			main := b.next()
			helper := main.spawn(b)
			helper.do("listen", "")
			test.before(b, main)
			main.tell("exit", fmt.Sprint(test.exit))
			helper.gets("SIGTERM")
			helper.tell("exit", "0")
			b.ends(test.exit)
		})
	}
}

// A main process that ends in an upgrade has not done what it was to do.
func TestUnfinishedUpgradeIsNoSuccess(t *testing.T) {
	t.Parallel()
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.do("notify", "RELOADING=1\nMONOTONIC_USEC=1")
	main.tell("exit", "0")
	b.ends(1)
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
			second.tell("exit", "3")
			stray.gets("SIGTERM")
			helper.gets("SIGTERM")
			stray.tell("exit", "0")
			stray.ends()
			for began := time.Now(); time.Since(began) < 20*time.Millisecond; {
				first.barrier() // the helper has its time
			}
			if hangs { // and does not wait for its children
				syscall.Kill(first.pid, syscall.SIGSTOP)
				until(t, "the older generation is stopped", func() bool { return stateOf(first.pid) == "T" })
			}
			helper.tell("exit", "0") // of which nobody tells the supervisor
			b.log.await("not waiting for older generations")
			b.log.await("msg=ended")
			if !hangs { // else the kernel continues it: its group is nobody's
				first.getsNoMore()
			}
		})
	}
}

// As process 1, the end of the supervisor is that of all.
func TestPID1Crash(t *testing.T) {
	t.Parallel()
	b := startPID1(t, []string{"-stop", "1h"}, "puppet")
	first := b.next()
	second := first.upgrade(b)
	second.tell("exit", "3")
	first.ends()
	b.log.await("not waiting for older generations")
	if status := <-b.status; status == 0 {
		t.Error("exit status 0")
	}
}

func TestStopWaitsForDraining(t *testing.T) {
	t.Parallel()
	b := startBed(t, []string{"-hurry", "1ms"}, "puppet")
	first := b.next()
	second := first.upgrade(b)
	b.signal(syscall.SIGTERM)
	second.gets("SIGTERM")
	second.tell("exit", "0")
	b.log.await("waiting for what is left")
	for began := time.Now(); time.Since(began) < 50*time.Millisecond; {
		first.barrier()
	}
	first.getsNoMore()
	first.tell("exit", "0")
	first.ends()
	b.log.await("msg=ended")
	if n := b.log.count("not waiting"); n != 0 {
		t.Error("it has not waited")
	}
}

func TestActivatedServiceIsNotStarted(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	broken := filepath.Join(b.dir, "broken")
	if err := os.WriteFile(broken, []byte("#!/nowhere/interpreter\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	b.start(exec.Command("/bin/sh", "-c", `LISTEN_FDS=0 LISTEN_PID=$$ exec "$0" "$@"`, os.Args[0], "supervise", "--", broken))
	b.log.await("can't start the service", broken)
	b.ends(127)
}
