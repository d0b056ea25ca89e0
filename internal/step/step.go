// Package step names the steps of a handover, so that tests can let a process die, wait,
// or check something at each of them. It also says how long an acknowledgement and a death may
// take.
package step

import (
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"time"
)

// A Step is one of the variables below, or one that a test has made with New and keeps in
// a variable. A test with a misspelt step does not compile.
type Step struct{ name string }

// The steps of a parent, in the order of a handover.
var (
	ChildStarted            = Step{"child started"}
	ReadyReceived           = Step{"ready received"}
	BeforeCommit            = Step{"before commit"}
	AfterCommit             = Step{"after commit"}
	AcknowledgementReceived = Step{"acknowledgement received"}
	ManagerNotified         = Step{"manager notified"}
)

// The steps of a child, in the order of a handover.
var (
	HereSaid        = Step{"here said"}
	PIDFilePrepared = Step{"pid file prepared"}
	ReadySaid       = Step{"ready said"}
	VerdictReceived = Step{"verdict received"}
	PIDFileWritten  = Step{"pid file written"}
	Acknowledged    = Step{"acknowledged"}
)

// The steps of a trial: the parent's, of which the first two come before BeforeCommit, and
// the child's, which comes before VerdictReceived.
var (
	TrialBegun    = Step{"trial begun"}
	TrialOver     = Step{"trial over"}
	UndoneAwaited = Step{"undone awaited"} // by the next upgrade
	OnTrial       = Step{"on trial"}
)

// Trial are the steps of a trial.
var Trial = []Step{TrialBegun, TrialOver, UndoneAwaited, OnTrial}

// All are the steps of a handover without a trial.
var All = []Step{
	ChildStarted, ReadyReceived, BeforeCommit, AfterCommit, AcknowledgementReceived, ManagerNotified,
	HereSaid, PIDFilePrepared, ReadySaid, VerdictReceived, PIDFileWritten, Acknowledged,
}

// AcknowledgeTimeout is how long a child may take to acknowledge a commit, which it
// does at once unless it is suspended. Tests make it shorter.
var AcknowledgeTimeout = 10 * time.Second

// LineGrace is how long a line that a child has begun to say gets to end, if there is no
// other time for it. Tests make it shorter.
var LineGrace = time.Second

// ExitGrace is how long a child that has given up gets to exit by itself, so that its exit
// status can be told. Tests make it longer where the child exits.
var ExitGrace = time.Second

// KillTimeout is how long the death of a child may take once it was killed. Tests make it
// longer, because a busy machine may need more.
var KillTimeout = time.Second

// MaxTrial bounds Options.Trial. Tests make it shorter.
var MaxTrial time.Duration = math.MaxInt64

func (s Step) String() string { return s.name }

// added are the steps of New.
var added []Step

// New returns a further step, for a package variable of a test. It panics if there is a
// step of this name.
func New(name string) Step {
	if _, err := Parse(name); err == nil {
		panic(fmt.Sprintf("two steps are named %q", name))
	}
	s := Step{name}
	added = append(added, s)
	return s
}

// Parse returns the step of this name, for a test's process that finds the name in its
// environment.
func Parse(name string) (Step, error) {
	for _, s := range slices.Concat(All, Trial, added) {
		if s.name == name {
			return s, nil
		}
	}
	return Step{}, fmt.Errorf("no step is named %q", name)
}

var hook atomic.Pointer[func(Step)]

// SetHook has every Reached call f. It returns the function that was set before. It is
// for tests. A nil f is not called.
func SetHook(f func(Step)) (before func(Step)) {
	var old *func(Step)
	if f == nil {
		old = hook.Swap(nil)
	} else {
		old = hook.Swap(&f)
	}
	if old == nil {
		return nil
	}
	return *old
}

// Reached says that this process has reached s.
func Reached(s Step) {
	if f := hook.Load(); f != nil {
		(*f)(s)
	}
}
