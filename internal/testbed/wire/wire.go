// Package wire is what the test-bed and its server say to each other: the events
// that a server reports, the faults that it is told to have, and the content of
// the answers, so that a client can check every byte.
package wire

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"
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
	At      time.Time
	Error   string `json:",omitempty"`
	Victim  int    `json:",omitempty"` // PID, with Injecting
}

// What a server reports of its life, in order.
const (
	Created       = "created"        // New has returned
	OnTrial       = "on-trial"       // Ready has returned nil, and the parent is in charge
	Ready         = "ready"          // so it has, and the process is in charge
	Upgraded      = "upgraded"       // Upgrade has returned nil
	UpgradeFailed = "upgrade-failed" // with its error
	Drained       = "drained"        // the next thing it does is to exit

	// Injecting is reported right before a fault.
	Injecting = "injecting"
)

// The steps of a child's program, in order, before it calls Ready. Faults happen at
// these, and at those of a handover (package step).
const (
	BeforeNew   = "before new"
	AfterNew    = "after new"
	Claimed     = "claimed"
	BeforeReady = "before ready"
)

// ProgramSteps are the steps of a child's program.
var ProgramSteps = []string{BeforeNew, AfterNew, Claimed, BeforeReady}

// The actions of a fault.
const (
	Crash    = "crash"   // panic
	ExitZero = "exit-0"  // give up, but with a status that says success
	Kill     = "kill"    // SIGKILL
	Hang     = "hang"    // what has come to the step never goes on; the other process is stopped by SIGSTOP
	Suspend  = "suspend" // SIGSTOP, until the test-bed sends SIGCONT
)

// The processes that a fault can happen to.
const (
	Child  = "child"
	Parent = "parent"
)

// Fault is the content of the fault file: "ACTION VICTIM STEP". Whichever process
// comes to the step does that to itself, or to the other one.
type Fault struct{ Action, Victim, Step string }

func (f Fault) String() string { return f.Action + " " + f.Victim + " " + f.Step }

// ParseFault is the inverse of Fault.String.
func ParseFault(s string) (Fault, error) {
	words := strings.SplitN(s, " ", 3)
	if len(words) != 3 {
		return Fault{}, fmt.Errorf("%q is not a fault", s)
	}
	return Fault{words[0], words[1], words[2]}, nil
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
