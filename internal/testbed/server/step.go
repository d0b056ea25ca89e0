//go:build linux && !cloudflare

package main

import (
	"slices"

	"example.com/tableflip/internal/step"
)

func hookSteps(cfg config) {
	step.AcknowledgeTimeout = cfg.acknowledgeTimeout
	step.SetHook(func(s step.Step) { reached(s.String()) })
}

var parentSteps = []step.Step{
	step.ChildStarted, step.ReadyReceived, step.TrialBegun, step.TrialOver, step.BeforeCommit, step.AfterCommit,
	step.AcknowledgementReceived, step.ManagerNotified,
}

// isParentStep reports whether it is a parent that comes to a step during an upgrade.
func isParentStep(name string) bool {
	return slices.ContainsFunc(parentSteps, func(s step.Step) bool { return s.String() == name })
}
