//go:build unix

package handovertest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/proctest"
)

// A process that a child starts before New, or a program that it executes, inherits
// nothing of the handover.

const (
	earlyVariable = "HANDOVERTEST_EARLY" // when a child starts another process
	imageVariable = "HANDOVERTEST_IMAGE" // set in a program that has executed itself
)

// A package that starts a process while it is initialised knows nothing of roles.
func init() {
	if os.Getenv(earlyVariable) == "init" {
		startEarly()
	}
}

// startEarly starts a service of the same kind, and has it report what it got.
func startEarly() {
	os.Unsetenv(earlyVariable)
	early := exec.Command(os.Args[0])
	early.Env = append(os.Environ(), proctest.Environment("subprocess"))
	early.Stdout, early.Stderr = os.Stdout, os.Stderr
	proctest.Must(0, early.Run())
}

func TestInheritEarly(t *testing.T) {
	for _, moment := range []string{"init", "main"} {
		t.Run(moment, func(t *testing.T) {
			upg, s := NewParent(t, tableflip.Options{}, "start-early", earlyVariable+"="+moment)
			for _, err := range []error{
				proctest.ErrorOf(upg.Listen("tcp", "localhost:0")),
				proctest.ErrorOf(upg.ListenPacket("udp", "localhost:0")),
				upg.AddFile("file", os.Stderr),
			} {
				proctest.OK(t, err)
			}
			Upgrade(t, upg)
			early := s.Await("subprocess")
			if child := s.Await("ready"); child.Text != "true" || child.PID == early.PID {
				t.Errorf("the child reports %v", child)
			}
			proctest.OK(t, s.Command("subprocess").Run())
			if want := s.Await("subprocess").Text; early.Text != want || !strings.HasPrefix(want, "false ") {
				t.Errorf("HasParent, descriptors, variables and Ready of an early process: %s, want %s", early.Text, want)
			}
		})
	}
}

func init() {
	proctest.Role("start-early", func() {
		if os.Getenv(earlyVariable) == "main" {
			startEarly()
		}
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		proctest.Report("ready", upg.HasParent())
	})
}

// executeItself replaces this program by itself.
func executeItself() {
	proctest.Must(0, os.Setenv(imageVariable, "2"))
	proctest.Must(0, syscall.Exec(proctest.Must(os.Executable()), os.Args, os.Environ()))
}

// Executed before New, the program finds nothing, and must not take itself for a first
// generation.
func TestInheritExecBeforeNew(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "execute-before-new")
	proctest.OK(t, proctest.ErrorOf(upg.Listen("tcp", "localhost:0")))
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil {
		t.Error("the upgrade succeeded")
	}
	for range 2 {
		m := s.Await("new")
		if !strings.Contains(m.Text, "tableflip: this process has executed its program anew") || !strings.Contains(m.Text, "Options.Command") {
			t.Errorf("New: %s", m.Text)
		}
	}
}

func init() {
	proctest.Role("execute-before-new", func() {
		if os.Getenv(imageVariable) == "" {
			executeItself()
		}
		for range 2 {
			proctest.Report("new", proctest.ErrorOf(tableflip.New(tableflip.Options{})))
		}
		os.Exit(5)
	})
}

// Executed after New, it is a first generation, of whatever it is then.
func TestInheritExecAfterReady(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "execute-after-ready")
	proctest.OK(t, proctest.ErrorOf(upg.Listen("tcp", "localhost:0")))
	Upgrade(t, upg)
	child := s.Await("ready")
	again := s.Await("again")
	proctest.OK(t, s.Command("subprocess").Run())
	if want := s.Await("subprocess").Text; again.Text != want || again.PID != child.PID {
		t.Errorf("HasParent, descriptors, variables and Ready in a new image of %d: %v, want %s", child.PID, again, want)
	}
}

func init() {
	proctest.Role("execute-after-ready", func() {
		descriptors, variables := foreignDescriptors(), Variables()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		err := upg.Ready()
		if os.Getenv(imageVariable) == "" {
			proctest.Report("ready", err)
			executeItself()
		}
		proctest.Report("again", upg.HasParent(), descriptors, variables, err)
	})
}

// A child that was started by a wrapper finds what its parent passed, and a marker that
// another process has left is none of its business.
func TestInheritForeignMarker(t *testing.T) {
	t.Setenv("TABLEFLIP_TAKEN", "1")
	upg, s := NewParent(t, tableflip.Options{}, "answer-marker")
	Upgrade(t, upg)
	if m := s.Await("ready"); m.Text != "true " {
		t.Errorf("HasParent and the marker: %q", m.Text)
	}
}

func init() {
	proctest.Role("answer-marker", func() {
		if inherit.Variables() == nil {
			panic("no table")
		}
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		proctest.Report("ready", upg.HasParent(), os.Getenv("TABLEFLIP_TAKEN"))
	})
}

// A table that has leaked from another process says nothing about this one's
// descriptors, which its own children may be meant to have.
func TestInheritForeignDescriptors(t *testing.T) {
	read, write, err := os.Pipe()
	proctest.OK(t, err)
	defer read.Close()
	defer write.Close()
	file := proctest.Opened[*os.File](t)(os.Open(os.DevNull))
	pipeID := func(pipe *os.File) (id string) {
		proctest.OK(t, descriptor.Control(pipe, func(fd uintptr) error {
			device, inode, err := descriptor.IdentifyPipe(fd)
			id = fmt.Sprintf("%d:%d", device, inode)
			return err
		}))
		return id
	}
	for _, test := range []struct {
		story, pipes   string
		ready, verdict *os.File
		taken          bool
	}{
		{"the table's", pipeID(write) + " " + pipeID(read), write, read, true},
		{"others", "1:2 3:4", write, read, false},
		{"another ready pipe", "1:2 " + pipeID(read), write, read, false},
		{"another verdict pipe", pipeID(write) + " 3:4", write, read, false},
		{"pipes that look all the same", "0:0 0:0", write, read, true},
		{"a file for the ready pipe", "0:0 0:0", file, read, false},
		{"a file for the verdict pipe", "0:0 0:0", write, file, false},
	} {
		t.Run(test.story, func(t *testing.T) {
			s := proctest.NewService(t)
			cmd := s.Command("close-on-exec", inherit.Variable+"=1 "+test.pipes+" fds=1 parts=0 pid=1 until=2")
			cmd.ExtraFiles = []*os.File{test.ready, test.verdict, file, file}
			proctest.OK(t, cmd.Run())
			if got, want := s.Await("close-on-exec").Text, fmt.Sprint(test.taken, test.taken, test.taken, false); got != want {
				t.Errorf("close-on-exec of the descriptors from 3 on: %s, want %s", got, want)
			}
		})
	}
}

func init() {
	proctest.Role("close-on-exec", func() {
		var flags []any
		for fd := inherit.ReadyFD; fd <= inherit.FirstFD+1; fd++ {
			flags = append(flags, proctest.Must(descriptor.IsCloseOnExec(uintptr(fd))))
		}
		proctest.Report("close-on-exec", flags...)
	})
}
