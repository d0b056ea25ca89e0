//go:build linux

package main

import (
	"strings"
	"testing"
	"time"

	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/testbed/proc"
	"example.com/tableflip/internal/testbed/wire"
)

// TestSums shows that faults are summed up over their steps, and what the processes held
// over time.
func TestSums(t *testing.T) {
	b := &bed{began: time.Now(), took: 100 * time.Second}
	b.faultCount = 1
	for i := range 20 {
		r := &row{began: b.began.Add(time.Duration(5*i) * time.Second), outcome: succeeded, held: proc.Use{Memory: 1000 + i, Descriptors: 40, Threads: 9}}
		switch i {
		case 3, 4:
			r.fault.injected = wire.Fault{Action: wire.Kill, Victim: wire.Child, Step: step.All[i].String()}
			r.outcome = refused
		case 5:
			r.fault.environment = noBinary
			r.outcome = refused
			r.held = proc.Use{} // not known
		}
		b.rows = append(b.rows, r)
	}
	var out strings.Builder
	b.reportFaults(&out)
	b.reportHeld(&out)
	var lines []string
	for line := range strings.Lines(out.String()) {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	for _, want := range []string{
		"kill child some step 2 [refused:2]",
		"no binary 1 [refused:1]",
		"none 17 [upgraded:17]",
		"10s 2 1001 1001 40 40 9",
		"30s 1 1004 1004 40 40 9",
		"1m40s 2 1019 1019 40 40 9",
	} {
		if n := strings.Count("\n"+strings.Join(lines, "\n")+"\n", "\n"+want+"\n"); n != 1 {
			t.Errorf("%q is %d times in the report:\n%s", want, n, out.String())
		}
	}
}
