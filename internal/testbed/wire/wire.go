// Package wire is what the test-bed and its server say to each other: the events
// that a server reports, the faults that it is told to have, and the content of
// the answers, so that a client can check every byte.
package wire

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
)

// Placeholder is the version in the server's binary as it was built. The test-bed
// writes another of the same length over it in each copy that it installs.
const Placeholder = "version-000000"

// Version is what takes the place of Placeholder in the binary of generation n.
func Version(n int) string { return fmt.Sprintf("version-%06d", n) }

// ParseVersion is the inverse of Version.
func ParseVersion(s string) (int, error) {
	digits, ok := strings.CutPrefix(s, "version-")
	if !ok {
		return 0, fmt.Errorf("%q is not a version", s)
	}
	return strconv.Atoi(digits)
}

// VersionHeader is the HTTP response field that names the version that answered.
const VersionHeader = "Testbed-Version"

// Event is a line of JSON on a server's standard output.
type Event struct {
	PID     int
	Version int
	Step    string
	Error   string `json:",omitempty"`
}

// The steps of a server's life, in order. A fault can happen at the first four.
const (
	BeforeNew   = "before-new"
	AfterNew    = "after-new"
	Claimed     = "claimed"
	BeforeReady = "before-ready"

	Ready         = "ready"          // in charge
	Upgraded      = "upgraded"       // Upgrade returned nil
	UpgradeFailed = "upgrade-failed" // with its error
	Drained       = "drained"        // the next thing it does is to exit

	// Stopping and KillingParent are reported right before a fault does that.
	Stopping      = "stopping"
	KillingParent = "killing-parent"
)

// FaultSteps are the steps at which a fault can happen.
var FaultSteps = []string{BeforeNew, AfterNew, Claimed, BeforeReady}

// The actions of a fault. They happen in the child, except for the last one.
const (
	Crash      = "crash"       // panic
	ExitZero   = "exit-0"      // give up, but with a status that says success
	Kill       = "kill"        // SIGKILL
	Hang       = "hang"        // until the parent loses patience
	Suspend    = "suspend"     // SIGSTOP, until the test-bed sends SIGCONT
	KillParent = "kill-parent" // SIGKILL to the parent, after which the child goes on
)

// Fault is the content of the fault file: "ACTION STEP".
type Fault struct{ Action, Step string }

func (f Fault) String() string { return f.Action + " " + f.Step }

// ParseFault is the inverse of Fault.String.
func ParseFault(s string) (f Fault, err error) {
	_, err = fmt.Sscan(s, &f.Action, &f.Step)
	return f, err
}

// Content returns the n bytes that id stands for.
func Content(id uint64, n int) []byte {
	source := rand.NewPCG(id, 1)
	content := make([]byte, 0, n+8)
	for len(content) < n {
		for v, i := source.Uint64(), 0; i < 8; i++ {
			content = append(content, byte('a'+v>>(8*i)&15))
		}
	}
	return content[:n]
}
