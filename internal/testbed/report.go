//go:build linux

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// report writes the tables of a finished run, and returns how much was lost or
// broken that the promises cover.
func (b *bed) report(w io.Writer) (bad int) {
	b.record.mu.Lock()
	defer b.record.mu.Unlock()
	fmt.Fprintf(w, "\n%s, seed %d: %v\n\n", b.library, b.seed, b.took.Round(time.Millisecond))
	b.excuseTheirs()
	b.reportUpgrades(w)
	b.reportFaults(w)
	b.reportHeld(w)
	byKind := make(map[string][3]int)
	for _, f := range b.record.failures {
		n := byKind[f.Kind]
		n[b.record.judge(f)]++
		byKind[f.Kind] = n
	}
	if len(b.kindNames) > 0 {
		b.reportKinds(w, byKind)
		b.reportLatency(w)
	}
	b.reportFailures(w)
	fmt.Fprintf(w, "descriptors of first generations: %v\nof later ones: %v\n\n", b.files.first, b.files.later)
	for _, n := range byKind {
		bad += n[lost]
	}
	total := bad
	bad += b.reportBroken(w)
	fmt.Fprintf(w, "%s: %d lost, %d promises broken otherwise, in %d upgrades and faults\n",
		b.library, total, bad-total, len(b.rows))
	return bad
}

// theirsLost is why nothing is promised for some upgrades of a mixed chain.
const theirsLost = "cloudflare/tableflip drained, or failed"

// isTheirs reports whether it is cloudflare/tableflip that may lose something in the upgrade.
func (r *row) isTheirs() bool {
	return r.from == cloudflare || r.to == cloudflare && r.outcome == refused
}

// excuseTheirs promises nothing for an upgrade after which cloudflare/tableflip drains, or a
// new process with it fails, which has accepted before.
func (b *bed) excuseTheirs() {
	if b.library != mixture {
		return
	}
	for i, f := range b.record.failures {
		n := b.upgradeOf(f)
		if n > 0 && b.record.judge(f) == lost && b.rows[n-1].isTheirs() {
			b.record.failures[i].unpromised = theirsLost
		}
	}
}

// reportBroken writes which other promises were broken, a lasting problem only once, and
// returns how many there were.
func (b *bed) reportBroken(w io.Writer) (bad int) {
	seen := make(map[string]bool)
	repeated := 0
	for i, r := range b.rows {
		for _, broken := range r.broken {
			bad++
			if seen[broken] {
				repeated++
				continue
			}
			seen[broken] = true
			fmt.Fprintf(w, "broken promise, upgrade %d (%v): %s\n", i+1, r.fault, broken)
		}
	}
	if repeated > 0 {
		fmt.Fprintf(w, "broken promises: %d more of the same\n", repeated)
	}
	for _, broken := range b.broken {
		bad++
		fmt.Fprintf(w, "broken promise: %s\n", broken)
	}
	return bad
}

// reportOutcomes writes the outcomes of upgrades in a row.
func (b *bed) reportOutcomes(w io.Writer) {
	outcomes := make(map[string]map[outcome]int)
	took, drained := make(map[string]time.Duration), make(map[string]time.Duration) // at the most
	restarts := 0
	for _, r := range b.rows {
		name := r.fault.String()
		if outcomes[name] == nil {
			outcomes[name] = make(map[outcome]int)
		}
		outcomes[name][r.outcome]++
		took[name], drained[name] = max(took[name], r.took), max(drained[name], r.drained)
		if r.outcome == crashed || r.outcome == outage {
			restarts++
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "fault\ttook at most\tdrain at most\toutcomes")
	for _, name := range slices.Sorted(maps.Keys(outcomes)) {
		fmt.Fprintf(t, "%s\t%v\t%v\t%s\n", name, took[name].Round(time.Millisecond), drained[name].Round(time.Millisecond),
			strings.TrimPrefix(fmt.Sprint(outcomes[name]), "map"))
	}
	t.Flush()
	fmt.Fprintf(w, "\n%d upgrades and %d restarts, %.1f upgrades a second\n\n", len(b.rows), restarts, float64(len(b.rows))/b.took.Seconds())
}

func (b *bed) reportUpgrades(w io.Writer) {
	if len(b.rows) == 0 {
		return
	}
	if b.inARow > 0 {
		b.reportOutcomes(w)
		return
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "upgrade\tat\tfault\tresult\ttook\tdrain\tlost")
	lostBy := make(map[int]int)
	for _, f := range b.record.failures {
		if b.record.judge(f) == lost {
			lostBy[b.upgradeOf(f)]++
		}
	}
	for i, r := range b.rows {
		drained := "-"
		if r.drained > 0 {
			drained = r.drained.Round(time.Millisecond).String()
		}
		result := string(r.outcome)
		if b.library == mixture {
			result += ", " + r.from + " to " + r.to
		}
		if r.err != "" {
			result += ": " + brief(r.err)
		}
		fmt.Fprintf(t, "%d\t%.1fs\t%v\t%s\t%v\t%s\t%d\n", i+1, r.began.Sub(b.began).Seconds(), r.fault, result,
			r.took.Round(time.Millisecond), drained, lostBy[i+1])
	}
	t.Flush()
	fmt.Fprintln(w)
}

// upgradeOf returns the number of the upgrade in which an exchange has failed: the last one
// before its end, or that before, if cloudflare/tableflip drained then and the exchange had
// begun. A client that pauses notices later.
func (b *bed) upgradeOf(f failure) int {
	n := b.upgradeBefore(f.Ended)
	if n > 1 && b.rows[n-2].isTheirs() && f.Began.Before(b.rows[n-2].concluded) {
		return n - 1
	}
	return n
}

// upgradeBefore returns the number of the upgrade that began last before a time.
func (b *bed) upgradeBefore(at time.Time) int {
	n := 0
	for i, r := range b.rows {
		if r.began.Before(at) {
			n = i + 1
		}
	}
	return n
}

func (b *bed) reportKinds(w io.Writer, byKind map[string][3]int) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "kind\tsent\tanswered\tLOST\tin a crash\tnot promised\tby generation")
	for _, kind := range b.kindNames {
		k := b.record.kinds[kind]
		if k == nil {
			continue
		}
		n := byKind[kind]
		var versions []string
		for _, v := range slices.Sorted(maps.Keys(k.versions)) {
			versions = append(versions, fmt.Sprintf("%d:%d", v, k.versions[v]))
		}
		if len(versions) > 6 {
			versions = append(append(versions[:3], "…"), versions[len(versions)-2:]...)
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%d\t%d\t%s\n", kind, k.sent, k.answered, n[lost], n[crash], n[unpromised], strings.Join(versions, " "))
	}
	t.Flush()
	fmt.Fprintln(w)
}

func (b *bed) reportLatency(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	header := "latency\tp50\tp99\tmax\t"
	if b.interleave > 0 {
		header += "control p50\tp99\tmax\tp99 ratio\t"
	}
	fmt.Fprintln(t, header)
	main := upgraded
	if b.interleave == 0 && b.upgrades+b.faultCount == 0 {
		main = control
	}
	for _, kind := range b.kindNames {
		k := b.record.kinds[kind]
		if k == nil {
			continue
		}
		fmt.Fprintf(t, "%s\t%s", kind, quantiles(&k.latency[main]))
		if b.interleave > 0 {
			fmt.Fprintf(t, "%s%.2f\t", quantiles(&k.latency[control]),
				float64(k.latency[upgraded].quantile(0.99))/float64(k.latency[control].quantile(0.99)))
		}
		fmt.Fprintln(t)
	}
	t.Flush()
	fmt.Fprintln(w)
}

func quantiles(h *histogram) string {
	var s strings.Builder
	for _, d := range []time.Duration{h.quantile(0.5), h.quantile(0.99), h.max} {
		fmt.Fprintf(&s, "%v\t", d.Round(10*time.Microsecond))
	}
	return s.String()
}

// reportFailures groups the failures by kind and reason.
func (b *bed) reportFailures(w io.Writer) {
	type group struct {
		verdict      verdict
		kind, reason string
	}
	counts := make(map[group]int)
	for _, f := range b.record.failures {
		g := group{b.record.judge(f), f.Kind, reason(f.Err)}
		counts[g]++
	}
	if len(counts) == 0 {
		return
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "failures\tcount\tkind\treason")
	for _, g := range slices.SortedFunc(maps.Keys(counts), func(x, y group) int {
		return cmp.Or(cmp.Compare(x.verdict, y.verdict), cmp.Compare(x.kind, y.kind), cmp.Compare(counts[y], counts[x]))
	}) {
		name := [...]string{"LOST", "in a crash", "not promised"}[g.verdict]
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\n", name, counts[g], g.kind, g.reason)
	}
	t.Flush()
	fmt.Fprintln(w)
	b.reportLost(w)
}

// reportLost writes when the first exchanges were lost, and how long they had taken,
// because a client that got no processor time may have sent its request too late.
func (b *bed) reportLost(w io.Writer) {
	const most = 10
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	n := 0
	for _, f := range b.record.failures {
		if b.record.judge(f) != lost {
			continue
		}
		if n++; n == 1 {
			fmt.Fprintln(t, "lost\tkind\tidle before\ttook\tstalled\tupgrade\tsince its signal")
		}
		i := b.upgradeBefore(f.Ended)
		since := "-"
		if i > 0 {
			since = f.Ended.Sub(b.rows[i-1].began).Round(time.Millisecond).String()
		}
		fmt.Fprintf(t, "%.1fs\t%s\t%v\t%v\t%v\t%d\t%s\n", f.Began.Sub(b.began).Seconds(), f.Kind, f.Idle.Round(time.Millisecond),
			f.Ended.Sub(f.Began).Round(time.Millisecond), b.record.stoodStill(f).Round(time.Millisecond), i, since)
		if n == most {
			break
		}
	}
	t.Flush()
	if n > 0 {
		fmt.Fprintln(w)
	}
}

var (
	addresses = regexp.MustCompile(`127\.0\.0\.1:\d+|(@|/\S+/sockets/web)`)
	numbers   = regexp.MustCompile(`\d+`)
)

// reason is the text of an error, less what differs from one failure to the next.
func reason(err error) string {
	if inner, ok := errors.AsType[*url.Error](err); ok {
		err = inner.Err
	}
	text := addresses.ReplaceAllString(err.Error(), "ADDR")
	if strings.HasPrefix(text, "content: ") {
		text = numbers.ReplaceAllString(text, "N")
	}
	return text
}
