//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	hand "example.com/tableflip/benchmarks/handover"
	ratios "example.com/tableflip/benchmarks/ratio"
	"github.com/jedib0t/go-pretty/v6/table"
)

// title is what the report calls a peer.
func title(name string) string {
	if p := peerOf(name); p != nil {
		return p.title
	}
	return name
}

// contenders are those of package handover, which serve no HTTP, the first being
// this library and the last the floor.
var contenders = []string{contenderOurs, contenderTableflip, contenderFloor}

const (
	contenderOurs      = string(hand.Ours)
	contenderTableflip = string(hand.Tableflip)
	contenderFloor     = string(hand.Floor)
)

func contenderTitle(name string) string {
	if name == contenderOurs {
		return "this library"
	}
	return name
}

// report writes report.md and the plots to a directory.
func (r *results) report(dir string) error {
	var out bytes.Buffer
	var errs error
	section := func(measure, plotName string, plot func(path string) error, text string, tables ...func() string) {
		if !slices.ContainsFunc(r.rows, func(row row) bool { return row.measure == measure }) {
			return
		}
		fmt.Fprintf(&out, "%s\n\n", strings.TrimSpace(text))
		if plot != nil {
			if err := plot(filepath.Join(dir, plotName)); err != nil {
				errs = errors.Join(errs, fmt.Errorf("%s: %w", plotName, err))
			}
			fmt.Fprintf(&out, "![%s](%s)\n\n", strings.TrimSuffix(plotName, ".svg"), plotName)
		}
		for _, table := range tables {
			fmt.Fprintf(&out, "%s\n\n", table())
		}
	}
	fmt.Fprintf(&out, "# Benchmarks against the field\n\n%s\n", r.preamble())
	section(requests, "", nil, summaryText, r.summaryTable)
	section(requests, "failed.svg", r.plotFailed, failedText, r.failedTable, r.failuresTable)
	section(handover, "", nil, handoverText, r.handoverTable)
	section(upgrade, "upgrade.svg", r.plotUpgrade, upgradeText, r.upgradeTable, r.slopeTable)
	section(latency, "latency.svg", r.plotTimeline, latencyText, r.latencyTable)
	section(steady, "", nil, steadyText, r.steadyTable)
	section(memory, "", nil, memoryText, r.memoryTable)
	section(imported, "", nil, importText, r.importTable)
	section(draining, "draining.svg", r.plotDraining, drainingText, r.drainingTable)
	section(series, "series.svg", r.plotSeries, seriesText, r.seriesTable)
	fmt.Fprintf(&out, "## Where this library is worse\n\n%s\n", r.worse())
	return errors.Join(errs, os.WriteFile(filepath.Join(dir, "report.md"), append(bytes.TrimSpace(out.Bytes()), '\n'), 0o644))
}

const (
	summaryText = `## In short

Failed requests per upgrade; connections per upgrade that the clients that keep one (they
have nine) had to open; from the signal on, in ms: the first answer of the new process, the
last one of the old, its end; the 99th percentile of latency under one
upgrade per second, divided by that without. Medians; in brackets the range.`

	failedText = `## Failed requests per upgrade

Failed requests divided by upgrades; of all kinds with the range
over rounds. 16 clients. A dash: the peer has no such clients, or tableflip lost nothing.`

	handoverText = `## Who answers, from the signal on

Median and range, in ms, under the same clients; the ratio is to tableflip. A process
that httpdrain drains goes on answering those who have a connection, and tells them to
leave, until they have left or are silent: that is how it loses nothing.`

	upgradeText = `## Time of an upgrade

In ms from the signal on: to the new process's call of ` + "`Ready`" + `; to the commit, when
` + "`Exit`" + ` is closed in the old one, which may drain from then on; to the return of ` + "`Ready`" + `,
after which the new one serves. Medians, and ranges of the last two; ratios of medians, and
their 95% intervals. The floor is a bare
exec of the same binary with the same descriptors, whose child calls ` + "`net.FileListener`" + ` for each.`

	latencyText = `## Latency under one upgrade per second

In ms, medians over rounds; the ratio to that without is the median of the rounds'.
What a slow answer delays counts as slow, too. The plot shows the slowest answer of each 20 ms
of the last round.`

	steadyText = `## Accepted connections per second

After an upgrade; the floor is a bare ` + "`net.Listen`" + `. Medians and ranges; the ratios are
medians of those of samples that were taken right after each other.`

	memoryText = `## Memory and descriptors per listener

Of a process that an upgrade has brought about: the difference to one listener. Memory
is what the process has for itself (RssAnon).`

	importText = `## What the import adds

The size of the binary, and the time from its start until it listens, beside a server
of net/http alone.`

	drainingText = `## Generations that drain at once

With Options.MaxDraining. A client keeps a connection to each generation, which therefore drains
after its upgrade, and every one answers on it before and after each of those that follow.
The times are from the signal on, in ms, by how many drain when the upgrade begins; the ratios are to an
upgrade of a chain of which none drains, right before or after. Medians, their ranges, and the ratios'
95% intervals. Memory (RssAnon) and descriptors are those of the process in charge, before the
upgrade. Tableflip refuses an upgrade while one generation drains.`

	seriesText = `## Many upgrades in a row

While a client connects to each all the time. Medians of the first and of the last tenth.`
)

func (r *results) text(metric string) string {
	for _, row := range r.rows {
		if row.measure == setting && row.metric == metric {
			return row.text
		}
	}
	return ""
}

func (r *results) preamble() string {
	var out strings.Builder
	fmt.Fprintf(&out, "    cd benchmarks && %s\n\n", r.text("command"))
	fmt.Fprintf(&out, "%s, %s, %s, %s of memory; load average %s at the start; %s; %s rounds in %s.\nThe clients themselves did not get to run for %s at most.\n",
		r.text("system"), r.text("go"), r.text("processors"), r.text("memory"), r.text("load average at the start"),
		r.text("date"), r.text("rounds"), r.text("duration"), r.text("longest stall"))
	var versions []string
	for _, p := range peers {
		version, skipped := r.text("version "+p.name), r.text("skipped "+p.name)
		if version != "" && !slices.Contains(versions, version) {
			versions = append(versions, version)
		}
		if skipped != "" {
			fmt.Fprintf(&out, "\nSkipped: %s (%s).\n", p.name, skipped)
		}
	}
	fmt.Fprintf(&out, "\nVersions: %s.\n", strings.Join(versions, ", "))
	return out.String()
}

// markdown renders a table.
func markdown(header []any, rows [][]any) string {
	w := table.NewWriter()
	w.AppendHeader(header)
	for _, row := range rows {
		w.AppendRow(row)
	}
	return w.RenderMarkdown()
}

// measured returns the peers that have rows of a measure, in the order of the tables.
func (r *results) measured(measure string) []string {
	var names []string
	for _, p := range peers {
		if len(r.abouts(measure, p.name)) > 0 {
			names = append(names, p.name)
		}
	}
	return names
}

// failedPerUpgrade returns the failed requests per upgrade of all rounds, and by round.
func (r *results) failedPerUpgrade(name, kind string) (all float64, rounds []float64) {
	kinds := kindNames
	if kind != "" {
		kinds = []string{kind}
	}
	return r.perUpgrade(name, "failed", kinds)
}

// perUpgrade divides what was counted of these kinds of clients by the upgrades: of all
// rounds, and by round.
func (r *results) perUpgrade(name, metric string, kinds []string) (all float64, rounds []float64) {
	upgrades := make(map[int]float64)
	for _, row := range r.of(handover, name, "", "upgrades") {
		upgrades[row.round]++
	}
	counted := make(map[int]float64)
	total := 0.0
	for _, k := range kinds {
		for _, row := range r.of(requests, name, k, metric) {
			counted[row.round] += row.value
			total += row.value
		}
	}
	n := 0.0
	for round := range upgrades {
		n += upgrades[round]
		rounds = append(rounds, counted[round]/upgrades[round])
	}
	return total / n, rounds
}

// openedPerUpgrade tells how many connections the clients that keep one had to open.
func (r *results) openedPerUpgrade(name string) string {
	if len(r.of(requests, name, lastingKinds[0], "opened")) == 0 {
		return "–" // an older run
	}
	opened, rounds := r.perUpgrade(name, "opened", lastingKinds)
	return withRange(fmt.Sprintf("%.1f", opened), fmt.Sprintf("%.1f", slices.Min(rounds)), fmt.Sprintf("%.1f", slices.Max(rounds)))
}

func withRange(text, low, high string) string {
	if low == high {
		return text
	}
	return text + " (" + low + "–" + high + ")"
}

func perUpgrade(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v < 0.095:
		return fmt.Sprintf("%.2f", v)
	case v < 9.95:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

func (r *results) failedTable() string {
	header := []any{""}
	for _, k := range kindNames {
		header = append(header, k)
	}
	header = append(header, "all", "all / tableflip", "upgrades", "requests", "failed without upgrades")
	tableflips, _ := r.failedPerUpgrade(tableflip, "")
	var rows [][]any
	for _, name := range r.measured(requests) {
		row := []any{title(name)}
		var sent, controlSent, controlFailed float64
		for _, k := range kindNames {
			if len(r.of(requests, name, k, "sent")) == 0 {
				row = append(row, "–")
				continue
			}
			failed, _ := r.failedPerUpgrade(name, k)
			row = append(row, perUpgrade(failed))
			sent += r.sum(requests, name, k, "sent")
			controlSent += r.sum(requests, name, k, "control sent")
			controlFailed += r.sum(requests, name, k, "control failed")
		}
		all, rounds := r.failedPerUpgrade(name, "")
		text := withRange("**"+perUpgrade(all)+"**", perUpgrade(slices.Min(rounds)), perUpgrade(slices.Max(rounds)))
		comparison := "–"
		if tableflips > 0 {
			comparison = ratio(all, tableflips)
		}
		rows = append(rows, append(row, text, comparison, len(r.of(handover, name, "", "upgrades")), sent,
			fmt.Sprintf("%g of %g", controlFailed, controlSent)))
	}
	return markdown(header, rows)
}

func (r *results) summaryTable() string {
	var rows [][]any
	for _, name := range r.measured(requests) {
		failed, _ := r.failedPerUpgrade(name, "")
		row := []any{title(name), "**" + perUpgrade(failed) + "**", r.openedPerUpgrade(name)}
		for _, metric := range []string{"new answers", "old answers last", "old exits"} {
			row = append(row, r.sample(handover, name, "", metric).format("%.0f"))
		}
		rows = append(rows, append(row, r.latencyRatio(name).format("%.2f")))
	}
	return markdown([]any{"", "failed requests", "connections opened anew", "new answers", "old answers last", "old exits", "p99"}, rows)
}

// failuresTable says how requests failed.
func (r *results) failuresTable() string {
	var rows [][]any
	for _, name := range r.measured(failures) {
		var causes []string
		for _, category := range r.abouts(failures, name) {
			causes = append(causes, fmt.Sprintf("%s: %g", category, r.sum(failures, name, category, "failed")))
		}
		rows = append(rows, []any{title(name), strings.Join(causes, "; ")})
	}
	if len(rows) == 0 {
		return "No request failed."
	}
	return markdown([]any{"", "what the clients saw"}, rows)
}

func (r *results) handoverTable() string {
	var rows [][]any
	for _, name := range r.measured(handover) {
		get := func(metric string) string { return r.sample(handover, name, "", metric).format("%.0f") }
		rows = append(rows, []any{title(name), get("new answers"), r.ratioTo(handover, tableflip, name, "", "new answers"), get("old answers last"), get("old exits"),
			r.sum(handover, name, "", "old remains"), r.sum(handover, name, "", "without a new process")})
	}
	return markdown([]any{"", "first answer of the new process", "ratio", "last answer of the old", "exit of the old",
		"old did not exit in 8 s", "upgrades without a new process"}, rows)
}

// ratioTo divides a peer's median by another's.
func (r *results) ratioTo(measure, other, name, about, metric string) string {
	theirs := r.sample(measure, other, about, metric)
	mine := r.sample(measure, name, about, metric)
	if mine.empty() || theirs.empty() {
		return "–"
	}
	return ratio(mine.median(), theirs.median())
}

func (r *results) sizes() []string { return r.abouts(upgrade, contenderOurs) }

func ratio(a, b float64) string { return fmt.Sprintf("%.2f", a/b) }

func (r *results) upgradeTable() string {
	var rows [][]any
	sizes := r.sizes()
	slices.SortFunc(sizes, func(a, b string) int { return number(a) - number(b) })
	for _, size := range sizes {
		row := []any{size}
		for _, c := range contenders {
			row = append(row,
				fmt.Sprintf("%.2f", r.sample(upgrade, c, size, "ready").median()),
				r.sample(upgrade, c, size, "commit").format("%.2f"),
				r.sample(upgrade, c, size, "serve").format("%.2f"))
		}
		for _, metric := range []string{"commit", "serve"} {
			for _, other := range []string{contenderTableflip, contenderFloor} {
				row = append(row, r.ratioWithInterval(upgrade, contenderOurs, other, size, metric))
			}
		}
		rows = append(rows, row)
	}
	return markdown([]any{"listeners", "this: ready", "commit", "serves", "tableflip: ready", "commit", "serves",
		"floor: ready", "commit", "serves", "commit: this / tableflip", "this / floor", "serves: this / tableflip", "this / floor"}, rows)
}

// ratioWithInterval divides the medians of what was measured in turns.
func (r *results) ratioWithInterval(measure, name, other, about, metric string) string {
	of, low, high := ratios.OfMedians(values(r.of(measure, name, about, metric)), values(r.of(measure, other, about, metric)))
	return fmt.Sprintf("%.2f (%.2f–%.2f)", of, low, high)
}

func number(s string) int {
	n, _ := strconv.Atoi(s)
	return n
}

// slopeTable says what a further listener costs, between the smallest and the largest
// number of them.
func (r *results) slopeTable() string {
	sizes := r.sizes()
	if len(sizes) < 2 {
		return ""
	}
	least := slices.MinFunc(sizes, func(a, b string) int { return number(a) - number(b) })
	most := slices.MaxFunc(sizes, func(a, b string) int { return number(a) - number(b) })
	var rows [][]any
	for _, metric := range []string{"ready", "commit", "serve"} {
		slope := func(c string) float64 {
			more := r.sample(upgrade, c, most, metric).median() - r.sample(upgrade, c, least, metric).median()
			return more * 1000 / float64(number(most)-number(least))
		}
		row := []any{metric}
		for _, c := range contenders {
			row = append(row, fmt.Sprintf("%.2f", slope(c)))
		}
		rows = append(rows, append(row, ratio(slope(contenderOurs), slope(contenderTableflip)), ratio(slope(contenderOurs), slope(contenderFloor))))
	}
	return markdown([]any{"µs for each listener between " + least + " and " + most, "this", "tableflip", "floor", "this / tableflip", "this / floor"}, rows)
}

func (r *results) latencyTable() string {
	header := []any{""}
	for _, q := range []string{"p50", "p99", "p99.9", "max"} {
		header = append(header, q+" without", "with")
	}
	header = append(header, "p99 with / without", "p99 with / tableflip's", "failed", "new processes, of upgrades asked for")
	var rows [][]any
	for _, name := range r.measured(latency) {
		row := []any{title(name)}
		for _, q := range []string{"p50", "p99", "p99.9", "max"} {
			for _, phase := range []string{"control", "upgrades"} {
				row = append(row, fmt.Sprintf("%.2f", r.sample(latency, name, phase, q).median()))
			}
		}
		rows = append(rows, append(row, r.latencyRatio(name).format("%.2f"), r.ratioTo(latency, tableflip, name, "upgrades", "p99"), r.sum(latency, name, "upgrades", "failed"),
			fmt.Sprintf("%g of %g", r.sum(latency, name, "upgrades", "new processes"), r.sum(latency, name, "upgrades", "asked"))))
	}
	return markdown(header, rows)
}

// latencyRatio is the p99 with upgrades divided by that without, round by round.
func (r *results) latencyRatio(name string) sample {
	var ratios []float64
	control := r.of(latency, name, "control", "p99")
	for i, with := range r.of(latency, name, "upgrades", "p99") {
		ratios = append(ratios, with.value/control[i].value)
	}
	return sampleOf(ratios)
}

func (r *results) steadyTable() string {
	var rows [][]any
	for _, c := range contenders {
		row := []any{contenderTitle(c), r.sample(steady, c, "", "accepted").format("%.0f"), r.sample(steady, c, "", "CPU time").format("%.1f")}
		for _, other := range contenders[1:] {
			row = append(row, fmt.Sprintf("%.3f", r.paired(steady, c, other, "", "accepted").median()))
		}
		rows = append(rows, row)
	}
	return markdown([]any{"", "connections/s", "server's CPU time per connection, µs", "connections / tableflip", "connections / floor"}, rows)
}

// paired divides what was measured right after each other.
func (r *results) paired(measure, name, other, about, metric string) sample {
	var ratios []float64
	theirs := r.of(measure, other, about, metric)
	for i, mine := range r.of(measure, name, about, metric) {
		ratios = append(ratios, mine.value/theirs[i].value)
	}
	return sampleOf(ratios)
}

func (r *results) memoryTable() string {
	var rows [][]any
	sizes := r.abouts(memory, contenderOurs)
	slices.SortFunc(sizes, func(a, b string) int { return number(a) - number(b) })
	// Of few listeners, the difference is chance.
	sizes = slices.DeleteFunc(sizes, func(size string) bool { return 1 < number(size) && number(size) < 100 })
	for _, c := range contenders {
		row := []any{contenderTitle(c)}
		for _, metric := range []string{"resident", "descriptors"} {
			base := r.sample(memory, c, sizes[0], metric).median()
			row = append(row, fmt.Sprintf("%.0f", base))
			for _, size := range sizes[1:] {
				each := (r.sample(memory, c, size, metric).median() - base) / float64(number(size)-number(sizes[0]))
				row = append(row, fmt.Sprintf("%.2f", each))
			}
		}
		rows = append(rows, row)
	}
	header := []any{""}
	for _, metric := range []string{"KiB", "descriptors"} {
		header = append(header, metric+" with "+sizes[0])
		for _, size := range sizes[1:] {
			header = append(header, "each of "+size)
		}
	}
	return markdown(header, rows)
}

func (r *results) importTable() string {
	var rows [][]any
	bare := importers[0]
	for _, name := range importers {
		size, start := r.sample(imported, name, "", "size"), r.sample(imported, name, "", "start")
		rows = append(rows, []any{title(name), fmt.Sprintf("%.0f", size.median()), fmt.Sprintf("%+.0f", size.median()-r.sample(imported, bare, "", "size").median()),
			start.format("%.2f"), fmt.Sprintf("%+.2f", start.median()-r.sample(imported, bare, "", "start").median())})
	}
	return markdown([]any{"", "size, KiB", "more", "start, ms", "more"}, rows)
}

// drainingSizes returns those numbers of generations that have a row in the table: one, its
// doublings, and the most.
func (r *results) drainingSizes() []string {
	sizes := r.abouts(draining, ended)
	most := slices.MaxFunc(sizes, func(a, b string) int { return number(a) - number(b) })
	return slices.DeleteFunc(sizes, func(size string) bool {
		n := number(size)
		return n&(n-1) != 0 && size != most
	})
}

func (r *results) drainingTable() string {
	var rows [][]any
	for _, size := range r.drainingSizes() {
		rows = append(rows, []any{size,
			r.sample(draining, kept, size, "commit").format("%.2f"), r.ratioWithInterval(draining, kept, ended, size, "commit"),
			r.sample(draining, kept, size, "serve").format("%.2f"), r.ratioWithInterval(draining, kept, ended, size, "serve"),
			r.sample(draining, kept, size, "resident").format("%.0f"), r.sample(draining, kept, size, "descriptors").format("%.0f")})
	}
	table := markdown([]any{"draining", "commit", "/ none drains", "serves", "/ none drains", "memory, KiB", "descriptors"}, rows)
	return table + fmt.Sprintf("\n\nWhen all drain, each of them holds %s KiB and %s descriptors. Of %g answers on their connections, %g failed.",
		r.sample(draining, kept, drains, "resident").format("%.0f"), r.sample(draining, kept, drains, "descriptors").format("%.0f"),
		r.sum(draining, kept, "", "asked"), r.sum(draining, kept, "", "failed"))
}

func (r *results) seriesTable() string {
	var rows [][]any
	for _, c := range contenders {
		cells := []any{contenderTitle(c)}
		for _, m := range []struct{ metric, verb string }{{"commit", "%.2f"}, {"resident", "%.0f"}, {"descriptors", "%.0f"}} {
			all := r.of(series, c, "", m.metric)
			tenth := max(1, len(all)/10)
			for _, part := range [][]row{all[:tenth], all[len(all)-tenth:]} {
				cells = append(cells, fmt.Sprintf(m.verb, sampleOf(values(part)).median()))
			}
		}
		rows = append(rows, append(cells, len(r.of(series, c, "", "commit")), fmt.Sprintf("%g of %g", r.sum(series, c, "", "failed"), r.sum(series, c, "", "connections"))))
	}
	return markdown([]any{"", "commit, ms: first", "last", "memory, KiB: first", "last", "descriptors: first", "last", "upgrades", "failed connections"}, rows)
}

// worse lists what a peer does better, as far as the samples differ by more than chance.
func (r *results) worse() string {
	var found []string
	for _, name := range r.measured(requests) {
		for _, k := range kindNames {
			mine, _ := r.failedPerUpgrade(ours, k)
			theirs, _ := r.failedPerUpgrade(name, k)
			if name != ours && theirs < mine {
				found = append(found, fmt.Sprintf("- failed requests, %s: %s, %s of %s", k, perUpgrade(mine), perUpgrade(theirs), title(name)))
			}
		}
	}
	compare := func(what, measure, mineName, peer, about, metric, verb string, moreIsBetter bool) {
		mine, theirs := r.sample(measure, mineName, about, metric), r.sample(measure, peer, about, metric)
		if peer == mineName || peer == "ours-shutdown" || !mine.differs(theirs) {
			return
		}
		if (theirs.median() < mine.median()) != moreIsBetter {
			found = append(found, fmt.Sprintf("- %s: "+verb+", "+verb+" of %s", what, mine.median(), theirs.median(), title(peer)))
		}
	}
	for _, name := range r.measured(handover) {
		compare("first answer of the new process, ms", handover, ours, name, "", "new answers", "%.1f", false)
		compare("last answer of the old process, ms", handover, ours, name, "", "old answers last", "%.1f", false)
		compare("exit of the old process, ms", handover, ours, name, "", "old exits", "%.1f", false)
	}
	for _, name := range r.measured(latency) {
		for _, q := range []string{"p50", "p99", "p99.9", "max"} {
			compare("latency with upgrades, "+q+", ms", latency, ours, name, "upgrades", q, "%.2f", false)
		}
	}
	for _, c := range contenders[1:] {
		for _, size := range r.sizes() {
			compare("commit of an upgrade with "+size+" listeners, ms", upgrade, contenderOurs, c, size, "commit", "%.2f", false)
			compare("serving after an upgrade with "+size+" listeners, ms", upgrade, contenderOurs, c, size, "serve", "%.2f", false)
		}
		compare("accepted connections per second", steady, contenderOurs, c, "", "accepted", "%.0f", true)
		compare("upgrades in a row, ms", series, contenderOurs, c, "", "commit", "%.2f", false)
	}
	if len(found) == 0 {
		return "Nowhere that these samples can tell (Mann-Whitney U test, 5%)."
	}
	return "What these samples can tell from chance (Mann-Whitney U test, 5%); failed requests: all.\n\n" + strings.Join(found, "\n")
}
