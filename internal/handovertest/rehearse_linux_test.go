package handovertest

import (
	"strings"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// A child that dies while the parent looks whether all is ready is found out.
func TestRehearseDiesLate(t *testing.T) {
	events, cancel := event.Subscribe()
	defer cancel()
	upg := NewUpgrader(t, tableflip.Options{Command: proctest.Shell("{ echo here -; echo ready; } >&3")})
	proctest.OK(t, upg.Ready())
	proctest.During(t, step.ReadyReceived, func() { proctest.AwaitDeath(t, upg.Generations()[1].PID) })
	if err := upg.Rehearse(t.Context()); err == nil || !strings.Contains(err.Error(), "was ready, and has died") {
		t.Errorf("Rehearse: %v", err)
	}
	all := shownHere(events)
	if last := all[len(all)-1]; !strings.HasPrefix(last, "failed ") || !strings.Contains(last, "cause=child") {
		t.Errorf("the events are %q", all)
	}
}
