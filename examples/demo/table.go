package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// report prints what came of it all. It returns an error if a request was lost,
// or was answered by a process that is none of the generations.
func report(out io.Writer, generations []generation, total tally) error {
	failed := map[int]int{} // by index in generations
	reasons := map[string]int{}
	for _, f := range total.failures {
		failed[responsible(generations, f)]++
		reasons[classify(generations, f)]++
	}

	served := 0
	strangers := maps.Clone(total.served)
	var text strings.Builder
	table := tabwriter.NewWriter(&text, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(&text)
	fmt.Fprintln(table, "generation\tversion\tPID\tUpgrade took\trequests\tfailed\t")
	for i, g := range generations {
		pid, took := "-", "-"
		if g.pid != 0 {
			pid = fmt.Sprint(g.pid)
		}
		if i > 0 {
			took = "unfinished"
			if g.took != 0 {
				took = shorten(g.took).String()
			}
		}
		fmt.Fprintf(table, "%d\t%s\t%s\t%s\t%d\t%d\t\n", i+1, g.version, pid, took, total.served[g.identity], failed[i])
		served += total.served[g.identity]
		delete(strangers, g.identity)
	}
	table.Flush()

	upgrades := 0
	for _, g := range generations[1:] {
		if g.took != 0 {
			upgrades++
		}
	}
	fmt.Fprintf(&text, "\n%d upgrades, %d requests served, %d failed\n", upgrades, served, len(total.failures))
	for _, reason := range slices.SortedFunc(maps.Keys(reasons), func(a, b string) int {
		return cmp.Or(cmp.Compare(reasons[b], reasons[a]), cmp.Compare(a, b))
	}) {
		fmt.Fprintf(&text, "%8d × %s\n", reasons[reason], reason)
	}
	if _, err := io.WriteString(out, text.String()); err != nil {
		return err
	}

	for who, n := range strangers {
		return fmt.Errorf("%d requests were answered by %s with PID %d, which is none of the generations", n, who.version, who.pid)
	}
	if len(total.failures) > 0 {
		return fmt.Errorf("%d of %d requests failed", len(total.failures), served+len(total.failures))
	}
	return nil
}

// responsible returns the index of the generation that had the connection of a
// failed request. For a new connection, nobody knows. Then the failure counts for the
// last generation that was alone when the request began. During an upgrade that is the
// old one, because the old one closes connections.
func responsible(generations []generation, f failure) int {
	last := 0
	for i, g := range generations {
		if f.reused && g.identity == f.previous {
			return i
		}
		if !g.alone.IsZero() && g.alone.Before(f.began) {
			last = i
		}
	}
	return last
}

// classify tells which kind of failure f is.
func classify(generations []generation, f failure) string {
	connection := ""
	if f.reused {
		connection = ", not the first on its connection"
	}
	return fmt.Sprintf("%s%s, %s: %s", f.client, connection, moment(generations, f), f.reason)
}

// moment tells when f happened, as far as upgrades are concerned. What the old
// process did to a connection may show only after its end.
func moment(generations []generation, f failure) string {
	for i, next := range generations[1:] {
		old := generations[i]
		switch {
		case f.ended.Before(next.asked):
			return "between upgrades"
		case next.listening.IsZero() || f.ended.Before(next.listening):
			return "while a new process started"
		case next.alone.IsZero() || f.began.Before(next.alone) || f.reused && f.previous == old.identity:
			return "by the drain of the old process"
		}
	}
	return "between upgrades"
}

// shorten leaves of a duration what a reader wants to know.
func shorten(d time.Duration) time.Duration {
	return d.Round(100 * time.Microsecond)
}
