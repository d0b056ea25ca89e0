//go:build linux

// Command timeline tells what the time of an upgrade consists of, and which part of that a
// bare exec does not need:
//
//	go run ./timeline -upgrades 400 -listeners 1,10,100,1000
//
// Both processes note when they come to the steps of the handover (internal/step). The
// pieces follow one upon the other, from the call of Upgrade until it returns. Each is
// measured in µs as the median over the upgrades, so that their sum is not quite the whole.
// For each number of listeners there are two columns: what this library needs, and how much more
// that is than what the bare exec needs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	hand "example.com/tableflip/benchmarks/handover"
	"example.com/tableflip/benchmarks/ratio"
	"example.com/tableflip/internal/step"
)

// A span is the time from one mark to another. The zero span is one that is not there.
type span struct{ from, to string }

// A piece is a part of an upgrade by this library, and what is in its place with a bare exec.
type piece struct {
	what        string
	ours, floor span
}

// both is the same span for both.
func both(what, from, to string) piece { return piece{what, span{from, to}, span{from, to}} }

// pieces follow one upon the other. What wakes a process up is measured from before its write,
// because the other may run before the write has returned.
var pieces = []piece{
	both("old: pipes, table, fork, until the new process executes", hand.UpgradeCalled, step.ChildStarted.String()),
	both("new: start of the runtime, package initialisation", step.ChildStarted.String(), hand.MainCalled),
	{"new: New, until it has said *here*", span{hand.MainCalled, step.HereSaid.String()}, span{hand.MainCalled, hand.NewReturned}},
	{"new: the rest of New", span{step.HereSaid.String(), hand.NewReturned}, span{}},
	both("new: claims a listener and a packet conn", hand.NewReturned, hand.ReadyCalled),
	both("new says *ready*, old wakes up", hand.ReadyCalled, step.ReadyReceived.String()),
	{"old: whether all is there for the commit", span{step.ReadyReceived.String(), step.BeforeCommit.String()}, span{}},
	{"old says *commit*, new wakes up", span{step.BeforeCommit.String(), step.VerdictReceived.String()}, span{}},
	{"new: PID file; it says *acknowledged*, old wakes up", span{step.VerdictReceived.String(), step.AcknowledgementReceived.String()}, span{}},
	{"old: tells the service manager, if there is one", span{step.AcknowledgementReceived.String(), step.ManagerNotified.String()}, span{}},
	{"old: closes Exit and the registry; returns", span{step.ManagerNotified.String(), hand.UpgradeReturned}, span{step.ReadyReceived.String(), hand.UpgradeReturned}},
}

// wholes are what the report compares, and what happens beside the pieces.
var wholes = []piece{
	both("**Upgrade, until it returns**", hand.UpgradeCalled, hand.UpgradeReturned),
	both("**until the new process's Ready returns**", hand.UpgradeCalled, hand.ReadyReturned),
	{"of which, after it has said *acknowledged*", span{step.Acknowledged.String(), hand.ReadyReturned}, span{}},
}

func main() {
	upgrades := flag.Int("upgrades", 400, "`number` of upgrades")
	listeners := flag.String("listeners", "1,10,100,1000", "`numbers` of listeners")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, *upgrades, *listeners, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "timeline:", err)
		os.Exit(1)
	}
}

// A column has a line of the table for each piece and whole.
type column struct {
	listeners string
	cells     []string
}

func run(ctx context.Context, upgrades int, listeners string, out io.Writer) error {
	dir, err := os.MkdirTemp("", "timeline")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	binary, err := build(ctx, dir)
	if err != nil {
		return err
	}
	var columns []column
	for word := range strings.SplitSeq(listeners, ",") {
		n, err := strconv.Atoi(word)
		if err != nil {
			return err
		}
		ours, floor, err := measure(ctx, binary, upgrades, n)
		if err != nil {
			return fmt.Errorf("with %d listeners: %w", n, err)
		}
		c, err := columnOf(word, ours, floor)
		if err != nil {
			return err
		}
		columns = append(columns, c)
	}

	header, line := "| listeners |", "| --- |"
	for _, c := range columns {
		header += " " + c.listeners + ": this, µs | more |"
		line += " --- | --- |"
	}
	fmt.Fprintf(out, "%s\n%s\n", header, line)
	for i, p := range slices.Concat(pieces, wholes) {
		fmt.Fprintf(out, "| %s |", p.what)
		for _, c := range columns {
			fmt.Fprint(out, c.cells[i])
		}
		fmt.Fprintln(out)
	}
	return nil
}

// columnOf compares upgrades by this library to those of the floor. A whole also has the ratio
// of the medians.
func columnOf(listeners string, ours, floor []hand.Timeline) (column, error) {
	c := column{listeners: listeners}
	for i, p := range slices.Concat(pieces, wholes) {
		mine, err := p.ours.median(ours)
		other, floorErr := p.floor.median(floor)
		if err := errors.Join(err, floorErr); err != nil {
			return c, err
		}
		more := fmt.Sprintf("%.0f", mine-other)
		if i >= len(pieces) && p.floor != (span{}) {
			more += fmt.Sprintf(" (%.2f)", mine/other)
		}
		c.cells = append(c.cells, fmt.Sprintf(" %.0f | %s |", mine, more))
	}
	return c, nil
}

// build builds the program that is upgraded.
func build(ctx context.Context, dir string) (binary string, err error) {
	binary = filepath.Join(dir, "chain")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", binary, "example.com/tableflip/benchmarks/servers/chain")
	cmd.Stderr = os.Stderr
	return binary, cmd.Run()
}

// median returns the median length of a span in µs, and 0 for one that is not there. It is an
// error if a mark is missing, which would count as the start of the machine.
func (s span) median(upgrades []hand.Timeline) (float64, error) {
	if s == (span{}) {
		return 0, nil
	}
	var lengths []float64
	for _, t := range upgrades {
		if t[s.from] == 0 || t[s.to] == 0 {
			return 0, fmt.Errorf("one of the marks %q and %q is missing: %v", s.from, s.to, t)
		}
		lengths = append(lengths, float64(t[s.to]-t[s.from])/1e3)
	}
	return ratio.Median(lengths), nil
}

// measure upgrades a chain of this library and one of the floor in turns.
func measure(ctx context.Context, binary string, upgrades, listeners int) (ours, floor []hand.Timeline, err error) {
	contenders := []hand.Contender{hand.Ours, hand.Floor}
	chains := make(map[hand.Contender]*hand.Chain)
	defer func() {
		for _, ch := range chains {
			err = errors.Join(err, ch.Close())
		}
	}()
	for _, c := range contenders {
		ch, err := hand.StartTimed(binary, c, listeners)
		if err != nil {
			return nil, nil, err
		}
		chains[c] = ch
	}
	timelines := make(map[hand.Contender][]hand.Timeline)
	for n := range upgrades + 1 {
		rand.Shuffle(len(contenders), func(i, j int) { contenders[i], contenders[j] = contenders[j], contenders[i] })
		for _, c := range contenders {
			if ctx.Err() != nil {
				return nil, nil, ctx.Err()
			}
			if _, err := chains[c].Upgrade(); err != nil {
				return nil, nil, err
			}
			t, err := chains[c].Timeline()
			if err != nil {
				return nil, nil, err
			}
			if n > 0 { // from the second on, all is inherited
				timelines[c] = append(timelines[c], t)
			}
		}
	}
	return timelines[hand.Ours], timelines[hand.Floor], nil
}
