package handovertest

import (
	"os"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/proctest"
)

// Outside Linux a process knows its parent, but not its other ancestors.
// If it took the table of a parent that waits for a leaked one, two first generations
// would run.
func TestLostAncestorsUnknown(t *testing.T) {
	wantNoNew(t, `sh -c '"$0" 3>&- 4>&-; exit' "$0"; exit 1`, "know-parent", 1, "did not arrive")
}

func init() {
	proctest.Role("know-parent", func() {
		process.UnknownAncestors = true
		_, err := tableflip.New(tableflip.Options{})
		proctest.Report("new", err)
		os.Exit(1)
	})
}
