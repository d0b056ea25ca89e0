//go:build linux

package main

import (
	"fmt"
	"io"
	"math"
	"text/tabwriter"
)

// This file owns the comparison of a mixed chain with one of cloudflare/tableflip alone.

// drains are the upgrades of a run without a fault in which the processes with one library
// have drained.
type drains struct {
	library string
	lost    []float64 // by upgrade
}

// drainsBy is called when the run has been reported.
func (b *bed) drainsBy(library string) *drains {
	b.record.mu.Lock()
	defer b.record.mu.Unlock()
	lostBy := make(map[int]int)
	for _, f := range b.record.failures {
		if f.unpromised == theirsLost || b.record.judge(f) == lost {
			lostBy[b.upgradeOf(f)]++
		}
	}
	d := &drains{library: library}
	for i, r := range b.rows {
		if r.from == library && r.fault.none() && r.outcome == succeeded {
			d.lost = append(d.lost, float64(lostBy[i+1]))
		}
	}
	return d
}

// mean returns the mean number of exchanges that were lost in an upgrade, and its standard
// error.
func (d *drains) mean() (mean, standardError float64) {
	n := float64(len(d.lost))
	var sum, squares float64
	for _, lost := range d.lost {
		sum += lost
	}
	mean = sum / n
	for _, lost := range d.lost {
		squares += (lost - mean) * (lost - mean)
	}
	return mean, math.Sqrt(squares / (n - 1) / n)
}

// reportDrains compares, and reports whether cloudflare/tableflip has lost no more in a
// mixed chain than alone, as far as that many upgrades can tell.
func reportDrains(w io.Writer, mixed, alone *bed) bool {
	theirs, theirsAlone := mixed.drainsBy(cloudflare), alone.drainsBy(cloudflare)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\nwho drained\tupgrades\tLOST\tper upgrade\tstandard error")
	row := func(chain string, d *drains) {
		mean, standardError := d.mean()
		fmt.Fprintf(t, "%s, %s\t%d\t%.0f\t%.2f\t%.2f\n", d.library, chain, len(d.lost), mean*float64(len(d.lost)), mean, standardError)
	}
	row("in the mixed chain", mixed.drainsBy(tableflip))
	row("in the mixed chain", theirs)
	row("alone", theirsAlone)
	t.Flush()
	if min(len(theirs.lost), len(theirsAlone.lost)) < 2 {
		return true
	}
	more, noise := theirs.mean()
	fewer, aloneNoise := theirsAlone.mean()
	ok := more-fewer <= 3*math.Hypot(noise, aloneNoise)
	if !ok {
		fmt.Fprintln(w, "\nbroken promise: cloudflare/tableflip loses more in a mixed chain than alone")
	}
	return ok
}
