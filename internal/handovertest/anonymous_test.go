//go:build unix

package handovertest

import (
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// On some systems all pipes have the same device and inode. There a token shows that a
// table was meant for this process.

// late replaces the time until which the sender of a table waits by one that has passed.
var late = regexp.MustCompile(`until=\d+`)

func TestAnonymousChain(t *testing.T) {
	t.Parallel()
	c, g, _ := startChain(t, anonymousVariable+"=1")
	for range 3 {
		g.Order("upgrade", proctest.Environment("fail"))
		if m := g.Await("upgraded"); m.Cause != "exit status 7" {
			t.Errorf("Upgrade returned %q, caused by %q", m.Text, m.Cause)
		}
		g = c.upgrade(g)
		c.wantCharge(g.PID)
	}
	c.wantStop(g)
}

func TestAnonymousParentKilled(t *testing.T) {
	t.Parallel()
	c := newChain(t)
	parent, reaped := c.start(anonymousVariable+"=1", c.DieAt(step.ReadyReceived))
	parent.AwaitStep(alone)
	parent.Order("upgrade")
	child := c.Next()
	<-reaped
	child.AwaitStep(alone)
	c.wantCharge(child.PID)
	c.wantStop(child)
}

// The parent of these tests is the test itself.
func anonymousPipes(t *testing.T) { proctest.Set(t, &descriptor.AnonymousPipes, true) }

func TestAnonymousLeaked(t *testing.T) {
	anonymousPipes(t)
	upg, s := NewParent(t, tableflip.Options{}, "leak-anonymous")
	Upgrade(t, upg)
	for _, pipes := range []string{"empty", "of another handover", "closed"} {
		if m := s.Await("leaked-anonymous"); m.Text != `false <nil> ""` {
			t.Errorf("with pipes that are %s, HasParent, Ready and the marker: %s", pipes, m.Text)
		}
	}
	s.AwaitEnd()
}

func init() {
	proctest.Role("leak-anonymous", func() {
		descriptor.AnonymousPipes = true
		variables := inherit.Variables()
		MustBeReady(proctest.Must(tableflip.New(tableflip.Options{})))
		for _, content := range []string{"", strings.Repeat("x", 26), "closed"} {
			leaked := exec.Command(os.Args[0])
			leaked.Env = append(os.Environ(), proctest.Environment("leaked-anonymous"))
			for name, value := range variables {
				leaked.Env = append(leaked.Env, name+"="+late.ReplaceAllString(value, "until=1"))
			}
			leaked.Stdout, leaked.Stderr = os.Stdout, os.Stderr
			read, write, err := os.Pipe()
			proctest.Must(0, err)
			if content == "closed" {
				write.Close()
				write = read
			} else {
				proctest.Must(write.WriteString(content))
			}
			leaked.ExtraFiles = []*os.File{write, read}
			proctest.Must(0, leaked.Run())
		}
	})
	proctest.Role("leaked-anonymous", func() {
		descriptor.AnonymousPipes = true
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Report("leaked-anonymous", upg.HasParent(), upg.Ready(), strconv.Quote(os.Getenv("TABLEFLIP_TAKEN")))
	})
}

// After a New that failed for another reason, the next one still has the token.
func TestAnonymousNewAgain(t *testing.T) {
	anonymousPipes(t)
	upg, s := NewParent(t, tableflip.Options{}, "new-without-descriptor")
	proctest.OK(t, upg.AddFile("file", os.Stderr))
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil {
		t.Error("the upgrade succeeded")
	}
	first, again := s.Await("new").Text, s.Await("new").Text
	if !strings.Contains(first, "inherit descriptor") || again != first {
		t.Errorf("New: %s\nand again: %s", first, again)
	}
}

func init() {
	proctest.Role("new-without-descriptor", func() {
		descriptor.AnonymousPipes = true
		unix.Close(5)
		for range 2 {
			proctest.Report("new", proctest.ErrorOf(tableflip.New(tableflip.Options{})))
		}
		os.Exit(5)
	})
}
