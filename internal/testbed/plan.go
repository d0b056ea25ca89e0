//go:build linux

package main

import (
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"example.com/tableflip/internal/testbed/wire"
)

// step is one thing that the test-bed does to the server: an upgrade, with at
// most one fault.
type step struct {
	at    time.Duration // since the beginning, at the earliest
	fault fault
}

// fault is what goes wrong in an upgrade; the zero value is nothing.
type fault struct {
	child       wire.Fault    // what the child is told to do
	environment string        // or what happens around it
	delay       time.Duration // until the parent is suspended, or gets the next signal
	length      time.Duration // of a suspension
}

// What can happen around a child. A directory that cannot be written to is stood
// in for by a file in its place, as permissions do not stop root.
const (
	noBinary         = "no binary"
	noPIDDirectory   = "no PID directory"
	fileForDirectory = "PID directory is a file"
	diskFull         = "no space for the PID file"
	fewDescriptors   = "no descriptor left"
	parentSuspended  = "parent suspended"       // by SIGSTOP, at some moment of the upgrade
	drainKilled      = "parent killed in drain" // by SIGKILL
	impatience       = "three signals"          // to upgrade, instead of one
)

func (f fault) none() bool { return f == fault{} }

// survivable reports whether the upgrade must succeed in spite of the fault.
func (f fault) survivable() bool {
	switch f.environment {
	case parentSuspended, drainKilled, impatience:
		return true
	}
	return f.none() || f.child.Action == wire.Suspend
}

func (f fault) String() string {
	switch {
	case f.none():
		return "none"
	case f.environment != "":
		return f.environment
	}
	return f.child.String()
}

// faults returns all the faults there are.
func faults() []fault {
	var list []fault
	environments := []string{noBinary, noPIDDirectory, fileForDirectory, fewDescriptors, parentSuspended, drainKilled, impatience}
	if os.Geteuid() == 0 { // it takes a mount
		environments = append(environments, diskFull)
	}
	for _, environment := range environments {
		list = append(list, fault{environment: environment})
	}
	for _, action := range []string{wire.Crash, wire.ExitZero, wire.Kill, wire.Hang, wire.Suspend, wire.KillParent} {
		for _, step := range wire.FaultSteps {
			list = append(list, fault{child: wire.Fault{Action: action, Step: step}})
		}
	}
	return list
}

// plan spreads upgrades, and upgrades with faults, over the duration. The kinds of
// faults take turns in random order. The last step has no fault if there is one
// such, so that the recovery from each fault is seen.
func plan(random *rand.Rand, duration time.Duration, upgrades, faulty int) []step {
	steps := make([]step, upgrades+faulty)
	var deck []fault
	for i := range faulty {
		if len(deck) == 0 {
			deck = faults()
			random.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		steps[i].fault = deck[0]
		steps[i].fault.delay = time.Duration(random.IntN(20_000)) * time.Microsecond
		steps[i].fault.length = time.Duration(200+random.IntN(800)) * time.Millisecond
		deck = deck[1:]
	}
	if upgrades > 0 {
		n := len(steps) - 1
		random.Shuffle(n, func(i, j int) { steps[i], steps[j] = steps[j], steps[i] })
	}
	var moments []time.Duration
	for range steps {
		moments = append(moments, time.Duration(random.Float64()*0.9*float64(duration)))
	}
	slices.Sort(moments)
	for i := range steps {
		steps[i].at = moments[i]
	}
	return steps
}
