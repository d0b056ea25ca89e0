//go:build linux

package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"example.com/tableflip/internal/testbed/proc"
)

// This file sums a long run up: its faults by kind, and what the processes hold over time.

// kind is the fault without its step.
func (f fault) kind() string {
	if f.injected.Action == "" {
		return f.String()
	}
	f.injected.Step = "some step"
	return f.String()
}

// reportFaults writes how often each kind of fault has happened, and how the upgrades went.
func (b *bed) reportFaults(w io.Writer) {
	if b.faultCount == 0 {
		return
	}
	count, outcomes := make(map[string]int), make(map[string]map[outcome]int)
	for _, r := range b.rows {
		kind := r.fault.kind()
		if count[kind]++; outcomes[kind] == nil {
			outcomes[kind] = make(map[outcome]int)
		}
		outcomes[kind][r.outcome]++
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "fault\tupgrades\toutcomes")
	for _, kind := range slices.Sorted(maps.Keys(count)) {
		fmt.Fprintf(t, "%s\t%d\t%s\n", kind, count[kind], strings.TrimPrefix(fmt.Sprint(outcomes[kind]), "map"))
	}
	t.Flush()
	fmt.Fprintln(w)
}

// reportHeld writes what the old processes held when their upgrades began, by tenths of the
// run.
func (b *bed) reportHeld(w io.Writer) {
	const parts = 10
	if len(b.rows) < parts {
		return
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "until\tupgrades\tmemory, KiB: median\tmost\tdescriptors: median\tmost\tthreads: most\t")
	for part := range parts {
		var held []proc.Use
		from, to := b.took*time.Duration(part)/parts, b.took*time.Duration(part+1)/parts
		for _, r := range b.rows {
			if at := r.began.Sub(b.began); at >= from && at < to && r.held != (proc.Use{}) {
				held = append(held, r.held)
			}
		}
		if len(held) == 0 {
			continue
		}
		column := func(of func(proc.Use) int) []int {
			var all []int
			for _, u := range held {
				all = append(all, of(u))
			}
			slices.Sort(all)
			return all
		}
		memory := column(func(u proc.Use) int { return u.Memory })
		descriptors := column(func(u proc.Use) int { return u.Descriptors })
		threads := column(func(u proc.Use) int { return u.Threads })
		n := len(held)
		fmt.Fprintf(t, "%v\t%d\t%d\t%d\t%d\t%d\t%d\t\n", to.Round(time.Second), n,
			memory[n/2], memory[n-1], descriptors[n/2], descriptors[n-1], threads[n-1])
	}
	t.Flush()
	fmt.Fprintln(w)
}
