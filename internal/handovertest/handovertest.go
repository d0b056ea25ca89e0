//go:build unix

// Package handovertest holds the tests of the root package that need real processes:
// chains of generations, deaths at each step of a handover, starts that fail, a mock
// service manager, and races. Here is what they share with the root's own tests; the
// words are those of package proctest.
package handovertest

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// NewUpgrader is for tests that need no child.
func NewUpgrader(t *testing.T, opts tableflip.Options) *tableflip.Upgrader {
	t.Helper()
	upg, err := tableflip.New(opts)
	proctest.OK(t, err)
	t.Cleanup(upg.Stop)
	return upg
}

// NewParent makes the test itself the first generation. Its children get the role
// and env, which may be changed between upgrades.
func NewParent(t *testing.T, opts tableflip.Options, role string, env ...string) (*tableflip.Upgrader, *proctest.Service) {
	t.Helper()
	s := proctest.NewService(t)
	customize := opts.Command
	opts.Command = func(cmd *exec.Cmd) {
		s.Prepare(cmd, role, env...)
		if customize != nil {
			customize(cmd)
		}
	}
	return NewUpgrader(t, opts), s
}

// Upgrade is for tests whose Ready and Upgrade succeed.
func Upgrade(t *testing.T, upg *tableflip.Upgrader) {
	t.Helper()
	proctest.OK(t, upg.Ready())
	proctest.OK(t, upg.Upgrade())
}

// MustBeReady is for roles.
func MustBeReady(upg *tableflip.Upgrader) { proctest.Must(0, upg.Ready()) }

// Variables returns what the environment holds of a handover.
func Variables() []string {
	return slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return !strings.HasPrefix(variable, "TABLEFLIP_")
	})
}
