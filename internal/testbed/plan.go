//go:build linux

package main

import (
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/testbed/wire"
)

// attempt is one thing that the test-bed does to the server: an upgrade, with at
// most one fault.
type attempt struct {
	at    time.Duration // since the beginning, at the earliest
	fault fault
}

// fault is what goes wrong in an upgrade; the zero value is nothing.
type fault struct {
	injected    wire.Fault    // what one of the processes does at a step
	environment string        // or what happens around them
	isLong      bool          // of a suspension: longer than a commit may stay unacknowledged
	hasTrial    bool          // the upgrade
	isCancelled bool          // the upgrade, on trial, before the step
	delay       time.Duration // until the test-bed does something
	length      time.Duration // of what it does
}

// What can happen around a child. A file takes the place of a directory that cannot be
// written to, because permissions do not stop root.
const (
	noBinary         = "no binary"
	noPIDDirectory   = "no PID directory"
	fileForDirectory = "PID directory is a file"
	diskFull         = "no space for the PID file"
	fewDescriptors   = "no descriptor left"
	parentSuspended  = "parent suspended" // by SIGSTOP, at some moment of the upgrade
	parentKilled     = "parent killed"    // by SIGKILL, at some moment of the upgrade
	childKilled      = "child killed"
	drainKilled      = "parent killed in drain"
	impatience       = "three signals" // to upgrade, instead of one
)

// What can happen at some moment of a trial.
const (
	cancelledOnTrial    = "cancelled on trial"
	childStopsOnTrial   = "child stopped on trial" // by SIGTERM
	childFailsOnTrial   = "child fails on trial"
	childKilledOnTrial  = "child killed on trial"
	parentKilledOnTrial = "parent killed on trial"
)

var trialEnvironments = []string{cancelledOnTrial, childStopsOnTrial, childFailsOnTrial, childKilledOnTrial, parentKilledOnTrial}

// cancels reports whether the test-bed cancels the upgrade during the trial.
func (f fault) cancels() bool {
	return f.environment == cancelledOnTrial || f.isCancelled
}

// leavesDraining reports whether the new process lives when its trial is undone.
func (f fault) leavesDraining() bool {
	switch f.environment {
	case cancelledOnTrial, childStopsOnTrial, childFailsOnTrial:
		return true
	}
	isChildKilled := f.injected.Victim == wire.Child && (f.isLong || f.injected.Action != wire.Suspend)
	return f.isCancelled && !isChildKilled && !f.endsParent()
}

func (f fault) none() bool { return f.injected == wire.Fault{} && f.environment == "" }

// endsParent reports whether the old process is killed before it can say how the upgrade
// went.
func (f fault) endsParent() bool {
	ends := f.injected.Action == wire.Kill || f.injected.Action == wire.Hang
	return f.environment == parentKilled || f.environment == parentKilledOnTrial || f.injected.Victim == wire.Parent && ends
}

func (f fault) String() string {
	switch {
	case f.none():
		return "none"
	case f.environment != "":
		return f.environment
	}
	text := f.injected.String()
	if f.isLong {
		text = "long " + text
	}
	if f.isCancelled {
		text += ", " + cancelledOnTrial
	}
	return text
}

// faults returns all the faults that there are.
func (cfg *config) faults() []fault {
	var list []fault
	environments := []string{noBinary, fewDescriptors, parentSuspended, parentKilled, childKilled, drainKilled, impatience}
	if cfg.library != mixture { // with which a child would end by Stop
		environments = append(environments, noPIDDirectory, fileForDirectory)
		if os.Geteuid() == 0 { // it takes a mount
			environments = append(environments, diskFull)
		}
	}
	if cfg.trial > 0 {
		environments = append(environments, trialEnvironments...)
	}
	for _, environment := range environments {
		list = append(list, fault{environment: environment})
	}

	steps := slices.Clone(wire.ProgramSteps)
	if cfg.library != cloudflare && cfg.library != mixture {
		for _, s := range step.All {
			steps = append(steps, s.String())
		}
	}
	crashing := wire.ProgramSteps
	if cfg.trial > 0 {
		steps = append(steps, step.TrialBegun.String(), step.TrialOver.String(), step.OnTrial.String())
		crashing = append(slices.Clone(crashing), step.OnTrial.String())
		for _, f := range faultsAt(step.VerdictReceived.String()) {
			f.isCancelled = true
			list = append(list, f)
		}
	}
	for _, at := range steps {
		list = append(list, faultsAt(at)...)
	}
	for _, at := range crashing {
		list = append(list, fault{injected: wire.Fault{Action: wire.ExitZero, Victim: wire.Child, Step: at}})
		if cfg.library != mixture { // see above
			list = append(list, fault{injected: wire.Fault{Action: wire.Crash, Victim: wire.Child, Step: at}})
		}
	}
	for i := range list {
		list[i].hasTrial = cfg.trial > 0
	}
	return list
}

// faultsAt returns what can happen at a step of an upgrade.
func faultsAt(step string) (list []fault) {
	for _, victim := range []string{wire.Child, wire.Parent} {
		for _, action := range []string{wire.Kill, wire.Hang, wire.Suspend} {
			list = append(list, fault{injected: wire.Fault{Action: action, Victim: victim, Step: step}})
		}
		list = append(list, fault{injected: wire.Fault{Action: wire.Suspend, Victim: victim, Step: step}, isLong: true})
	}
	return list
}

// kills returns those of the faults that only kill.
func (cfg *config) kills() []fault {
	environments := []string{parentKilled, childKilled, parentKilledOnTrial, childKilledOnTrial}
	return slices.DeleteFunc(cfg.faults(), func(f fault) bool {
		return f.injected.Action != wire.Kill && !slices.Contains(environments, f.environment)
	})
}

// The outcomes of an upgrade.
type outcome string

const (
	succeeded outcome = "upgraded"        // and the old process is told so
	refused   outcome = "refused"         // the old process is in charge
	tookOver  outcome = "child took over" // from an old process that was killed
	crashed   outcome = "crashed"         // the new process, when it was in charge
	outage    outcome = "outage"          // the old process was killed before the new one existed
	endless   outcome = "endless"
)

// moment is where a step lies with respect to what is said.
type moment int

const (
	beforeReady moment = iota
	tried              // both serve, and it will be some time until the commit
	uncommitted        // the child is ready, and has not acknowledged
	racing             // the child may or may not have acknowledged
	inCharge
)

func (f fault) moment() moment {
	if f.hasTrial {
		switch f.injected.Step {
		case step.ReadySaid.String(), step.ReadyReceived.String(), step.TrialBegun.String(), step.OnTrial.String():
			return tried
		}
	}
	switch f.injected.Step {
	case step.ReadySaid.String(), step.ReadyReceived.String(), step.TrialOver.String(), step.BeforeCommit.String(),
		step.VerdictReceived.String(), step.PIDFileWritten.String():
		return uncommitted
	case step.AfterCommit.String():
		return racing
	case step.Acknowledged.String(), step.AcknowledgementReceived.String(), step.ManagerNotified.String():
		return inCharge
	}
	return beforeReady
}

// stopsService reports whether the process that the fault stops may have requests to answer.
func (f fault) stopsService() bool {
	switch at := f.moment(); {
	case f.environment == parentSuspended || f.injected.Victim == wire.Parent:
		return true
	case f.hasTrial:
		return at != beforeReady
	default:
		return at == racing || at == inCharge
	}
}

// outcomes returns those that an upgrade with the fault may have from one library to
// another.
func (f fault) outcomes(from, to string) []outcome {
	switch {
	case from == to || !f.endsParent():
	case to == cloudflare, f.injected.Step == wire.BeforeNew:
		// It does not carry on if its parent dies before it is ready, and ours not if
		// its parent, with cloudflare/tableflip, dies before it has said what it passes on.
		return []outcome{tookOver, outage}
	}
	switch f.environment {
	case "":
	case parentKilled:
		return []outcome{tookOver, outage}
	case childKilled:
		return []outcome{refused, crashed}
	case parentKilledOnTrial:
		return []outcome{tookOver}
	case parentSuspended, drainKilled, impatience:
		return []outcome{succeeded}
	default:
		return []outcome{refused}
	}

	at, isChild := f.moment(), f.injected.Victim == wire.Child
	switch {
	case f.none():
		return []outcome{succeeded}
	case f.cancels() && f.endsParent():
		return []outcome{outage}
	case f.cancels():
		return []outcome{refused}
	case f.endsParent():
		return []outcome{tookOver}
	case f.injected.Action == wire.Suspend && f.isLong && isChild && at == uncommitted:
		return []outcome{refused}
	case f.injected.Action == wire.Suspend && f.isLong && isChild && at == racing:
		return []outcome{refused, succeeded}
	case f.injected.Action == wire.Suspend:
		return []outcome{succeeded}
	case at == racing:
		return []outcome{refused, crashed}
	case at == inCharge:
		return []outcome{crashed}
	}
	return []outcome{refused}
}

// plan spreads upgrades, and upgrades with faults, over the duration. The kinds of
// faults take turns in random order. The last attempt has no fault if there is one
// such, so that the recovery from each fault is seen.
func (cfg *config) plan(random *rand.Rand) []attempt {
	attempts := make([]attempt, cfg.upgrades+cfg.faultCount)
	for i, f := range cfg.draw(random, cfg.faults(), cfg.faultCount) {
		attempts[i].fault = f
	}
	if cfg.upgrades > 0 {
		n := len(attempts) - 1
		random.Shuffle(n, func(i, j int) { attempts[i], attempts[j] = attempts[j], attempts[i] })
	}
	var moments []time.Duration
	for range attempts {
		moments = append(moments, time.Duration(random.Float64()*0.9*float64(cfg.duration)))
	}
	slices.Sort(moments)
	for i := range attempts {
		attempts[i].at = moments[i]
	}
	return attempts
}

// planInARow has as many upgrades with a kill as without, mixed, without pauses.
func (cfg *config) planInARow(random *rand.Rand) []attempt {
	attempts := make([]attempt, cfg.inARow)
	for i, f := range cfg.draw(random, cfg.kills(), cfg.inARow/2) {
		attempts[i].fault = f
	}
	random.Shuffle(len(attempts), func(i, j int) { attempts[i], attempts[j] = attempts[j], attempts[i] })
	return attempts
}

// draw returns n of the faults, each of which comes as often as the others.
func (cfg *config) draw(random *rand.Rand, from []fault, n int) []fault {
	from = slices.DeleteFunc(from, func(f fault) bool { return !strings.Contains(f.String(), cfg.only) })
	if len(from) == 0 {
		return make([]fault, n)
	}
	var drawn, deck []fault
	for range n {
		if len(deck) == 0 {
			deck = slices.Clone(from)
			random.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		f := deck[0]
		deck = deck[1:]
		f.delay = time.Duration(random.IntN(20_000)) * time.Microsecond
		f.length = time.Duration(200+random.IntN(300)) * time.Millisecond
		if f.cancels() || slices.Contains(trialEnvironments, f.environment) {
			f.delay = time.Duration(random.Float64() * float64(cfg.trial) / 2)
		}
		switch {
		case f.isLong:
			f.length += cfg.acknowledgeTimeout
		case f.injected.Action == wire.Suspend:
			f.length = min(f.length, cfg.acknowledgeTimeout/2)
		}
		drawn = append(drawn, f)
	}
	return drawn
}
