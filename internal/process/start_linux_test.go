package process_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/proctest"
)

func TestStartRefuses(t *testing.T) {
	for _, test := range []struct {
		name string
		attr syscall.SysProcAttr
		want string
	}{
		{"parent-death signal", syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}, "Pdeathsig"},
		{"PID namespace", syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, "CLONE_NEWPID"},
		{"PID namespace of its children", syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWPID}, "CLONE_NEWPID"},
		{"debugger", syscall.SysProcAttr{Ptrace: true}, "Ptrace"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, sibling := range []bool{false, true} {
				_, err := process.Start(t.Context(), &exec.Cmd{Path: "/bin/true", SysProcAttr: &test.attr}, nil, sibling)
				if err == nil || !strings.Contains(err.Error(), "tableflip: Options.Command set ") || !strings.Contains(err.Error(), test.want) {
					t.Errorf("got %v, want an error that names %s", err, test.want)
				}
			}
		})
	}
}

// A command that sets nothing has the null device for its streams, of which this process
// keeps none open, its path for a name, and this process for a parent.
func TestStartDefaults(t *testing.T) {
	nulls := func() (n int) {
		for _, file := range proctest.OpenFiles(t, os.Getpid()) {
			if strings.Contains(file, os.DevNull) {
				n++
			}
		}
		return n
	}
	var pipe [2]int // in blocking mode, for cat
	proctest.OK(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	read, write := os.NewFile(uintptr(pipe[0]), "read"), os.NewFile(uintptr(pipe[1]), "write")
	before := nulls()
	p, err := process.Start(t.Context(), &exec.Cmd{Path: "/bin/cat", Stdin: read}, nil, false)
	read.Close()
	proctest.OK(t, err)
	if after := nulls(); after != before {
		t.Errorf("the null device is open %d times, and was %d times", after, before)
	}
	proctest.AwaitThat(t, "the process has its path for a name", func() bool { // a moment after Start
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID()))
		return string(name) == "/bin/cat\x00"
	})
	write.Close()
	proctest.Within(t, "the process to exit", p.Exited())
	proctest.OK(t, p.Err())

	pid := strconv.Itoa(os.Getpid())
	p, err = process.Start(t.Context(), &exec.Cmd{
		Path: "/bin/sh", Args: []string{"sh", "-c", "test $PPID = " + pid},
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true},
	}, nil, false)
	proctest.OK(t, err)
	proctest.Within(t, "the process to exit", p.Exited())
	if p.Err() != nil {
		t.Errorf("its parent is not this process: %v", p.Err())
	}
}

func init() {
	// limited starts shells that report their limit of open files: with as many
	// extra files as it is told, then with none, then by package os alone.
	proctest.Role("limited", func() {
		extra := proctest.Must(strconv.Atoi(proctest.Arg()))
		null := proctest.Must(os.Open(os.DevNull))
		shell := func(event string) *exec.Cmd {
			in, out, err := process.Streams()
			return &exec.Cmd{Path: "/bin/sh", Args: []string{"sh", "-c", "echo report $$ " + event + " \\\"$(ulimit -Sn)\\\""}, Stdin: in, Stdout: out, Stderr: err}
		}
		var own unix.Rlimit
		proctest.Must(0, unix.Getrlimit(unix.RLIMIT_NOFILE, &own))
		proctest.Report("hard", own.Max)
		start := func(cmd *exec.Cmd, extra int) {
			p := proctest.Must(process.Start(context.Background(), cmd, slices.Repeat([]uintptr{null.Fd()}, extra), false))
			<-p.Exited()
			proctest.Must(0, p.Err())
		}
		start(shell("extra"), extra)
		start(shell("none"), 0)
		proctest.Must(0, shell("other").Run())
		after := own
		proctest.Must(0, unix.Getrlimit(unix.RLIMIT_NOFILE, &after))
		proctest.Report("kept", after == own)
	})
}

func TestStartLimit(t *testing.T) {
	const soft = 64
	for _, test := range []struct {
		name   string
		extra  int
		raised bool
	}{
		{"fits", 40, false},
		{"leaves no room", 60, true},
		{"does not fit", 150, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := proctest.NewService(t)
			cmd := s.Command("limited", proctest.WithArg(strconv.Itoa(test.extra)))
			proctest.Shell("ulimit -Sn " + strconv.Itoa(soft) + ` && exec "$0"`)(cmd)
			proctest.OK(t, cmd.Run())
			hard := s.Await("hard").Text
			want := strconv.Itoa(soft)
			if test.raised {
				want = hard
			}
			if got := s.Await("extra").Text; got != want {
				t.Errorf("the limit is %s, want %s", got, want)
			}
			if got := s.Await("none").Text; got != strconv.Itoa(soft) {
				t.Errorf("what has no extra files then gets the limit %s, want %d", got, soft)
			}
			if got := s.Await("other").Text; got != strconv.Itoa(soft) {
				t.Errorf("what package os starts then gets the limit %s, want %d", got, soft)
			}
			if got := s.Await("kept").Text; got != "true" {
				t.Error("the limit of the process itself has changed")
			}
		})
	}
}

// A child that has been reaped leaves no descriptor behind.
func TestChildLeavesNothing(t *testing.T) {
	count := func() int { return len(proctest.Must(os.ReadDir("/proc/self/fd"))) }
	start := func() {
		p := proctest.Must(process.Start(t.Context(), &exec.Cmd{Path: "/bin/true"}, nil, false))
		<-p.Exited()
		proctest.OK(t, p.Err())
	}
	start() // the first one opens what stays
	before := count()
	start()
	if after := count(); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
