//go:build unix

package misuse

import (
	"os"
	"slices"
	"testing"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

func TestMain(m *testing.M) { proctest.Main(m) }

func init() {
	proctest.Role("used", func() {
		proctest.OpenWire()
		step.Reached(step.ReadySaid)
	})
	proctest.Role("unused", func() {})
}

// misuse skips a test that is not to fail now.
func misuse(t *testing.T) {
	t.Helper()
	if slices.Contains(os.Args, "pass") {
		t.SkipNow()
	}
}

func TestUse(t *testing.T) {
	s := proctest.NewService(t)
	s.Start(s.Command("used", s.Wire()))
	s.AwaitEnd()
}

func TestDuring(t *testing.T) {
	misuse(t)
	proctest.During(t, step.BeforeCommit, func() {})
}

func TestDieAt(t *testing.T) {
	misuse(t)
	s := proctest.NewService(t)
	s.Start(s.Command("used", s.Wire(), s.DieAt(step.BeforeCommit)))
	s.AwaitEnd()
}

func TestPauseAt(t *testing.T) {
	misuse(t)
	s := proctest.NewService(t)
	s.Start(s.Command("used", s.Wire(), s.PauseAt(step.BeforeCommit)))
	s.AwaitEnd()
}

func TestNoRole(t *testing.T) {
	misuse(t)
	proctest.Start(t, "misspelt")
}
