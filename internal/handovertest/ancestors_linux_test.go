package handovertest

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/proctest"
)

// On other systems than Linux a process knows its parent, and not the others before it.
// If it took the table of a parent that waits for a leaked one, two first generations
// would run.
func TestLostAncestorsUnknown(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(`sh -c '"$0" 3>&- 4>&-; exit' "$0"; exit 1`)}, "know-parent")
	proctest.OK(t, upg.Ready())
	var exit *exec.ExitError
	if err := upg.Upgrade(); !errors.As(err, &exit) {
		t.Errorf("Upgrade: %v", err)
	}
	if got := s.Await("new").Text; !strings.Contains(got, "did not arrive") {
		t.Errorf("New: %s", got)
	}
}

func init() {
	proctest.Role("know-parent", func() {
		process.UnknownAncestors = true
		_, err := tableflip.New(tableflip.Options{})
		proctest.Report("new", err)
		os.Exit(1)
	})
}
