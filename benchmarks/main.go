//go:build linux

// Command benchmarks compares this library to other ways of replacing a server: how
// many requests fail per upgrade, and how long an upgrade takes. See README.md.
//
//	go run . -out results
//	go run . -short -peers ours,tableflip,nginx -out /tmp/results
//	go run . -render -out results
//
// It exits with status 1 if this library, with httpdrain, lost a request.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	hand "example.com/tableflip/benchmarks/handover"
)

// measureGroups are what -measures chooses from.
var measureGroups = []string{requests, latency, upgrade, steady, imported, draining, series}

// A plan is how much is measured.
type plan struct {
	rounds   int
	control  time.Duration // without upgrades, before those that requests are counted under
	upgrades time.Duration // in which upgrades begin, one when the last is over, after the control
	latency  time.Duration // with one upgrade per second, and as long without
	sizes    []int         // numbers of listeners
	samples  int           // of what takes milliseconds, per round
	series   int
	draining int // generations at once
}

var (
	fullPlan = plan{
		rounds: 5, control: time.Second, upgrades: 6 * time.Second, latency: 4 * time.Second,
		sizes: []int{1, 10, 100, 1000, 10000}, samples: 20, series: 1000, draining: 24,
	}
	shortPlan = plan{
		rounds: 1, control: time.Second, upgrades: 2 * time.Second, latency: 2 * time.Second,
		sizes: []int{1, 100}, samples: 5, series: 50, draining: 6,
	}
)

// bench is one run.
type bench struct {
	results
	plan  plan
	built string // directory of the binaries
}

func main() {
	status, err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchmarks:", err)
		if status == 0 {
			status = 2
		}
	}
	os.Exit(status)
}

func run() (status int, err error) {
	short := flag.Bool("short", false, "measure a little of everything, in less than two minutes")
	peerNames := flag.String("peers", "", "`names` separated by commas; all by default: "+namesOf(peers))
	measures := flag.String("measures", "", "`names` separated by commas; all by default: "+strings.Join(measureGroups, ","))
	rounds := flag.Int("rounds", 0, "`number` of rounds, in each of which everything is measured")
	out := flag.String("out", "results", "`directory` for the report")
	render := flag.Bool("render", false, "measure nothing: make the report from results.csv once more")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	b := &bench{plan: fullPlan}
	if *short {
		b.plan = shortPlan
	}
	if *rounds > 0 {
		b.plan.rounds = *rounds
	}
	if *render {
		file, err := os.Open(filepath.Join(*out, "results.csv"))
		if err != nil {
			return 0, err
		}
		defer file.Close()
		r, err := readResults(file)
		if err != nil {
			return 0, err
		}
		return 0, r.report(*out)
	}
	selected, err := choose(peers, func(p *peer) string { return p.name }, *peerNames)
	if err != nil {
		return 0, err
	}
	groups, err := choose(measureGroups, func(name string) string { return name }, *measures)
	if err != nil {
		return 0, err
	}
	if b.built, err = os.MkdirTemp("", "benchmarks"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(b.built)
	b.say("building the servers")
	if err := buildServers(ctx, b.built); err != nil {
		return 0, err
	}
	b.describeMachine()
	b.set("command", command())
	stalled := watchForStalls()
	selected = b.installed(selected)
	begin := time.Now()
	if err := b.carryOut(ctx, b.tasks(selected, groups, *short)); err != nil {
		return 0, err
	}
	b.set("duration", time.Since(begin).Round(time.Second).String())
	b.set("longest stall", stalled().Round(time.Millisecond).String())
	if err := b.save(*out); err != nil {
		return 0, err
	}
	if lost := b.lost(); lost > 0 {
		return 1, fmt.Errorf("this library lost %g requests: see %s", lost, filepath.Join(*out, "report.md"))
	}
	return 0, nil
}

// command repeats the command line, except for where the report goes.
func command() string {
	words := []string{"go run ."}
	flag.Visit(func(f *flag.Flag) {
		if f.Name != "out" {
			words = append(words, "-"+f.Name+"="+f.Value.String())
		}
	})
	return strings.Join(words, " ")
}

func namesOf(peers []*peer) string {
	var names []string
	for _, p := range peers {
		names = append(names, p.name)
	}
	return strings.Join(names, ",")
}

// choose returns those of all that are named, or all.
func choose[T any](all []T, name func(T) string, names string) ([]T, error) {
	if names == "" {
		return all, nil
	}
	var chosen []T
	for wanted := range strings.SplitSeq(names, ",") {
		i := slices.IndexFunc(all, func(one T) bool { return name(one) == wanted })
		if i < 0 {
			return nil, fmt.Errorf("there is no %q", wanted)
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}

func (b *bench) say(format string, values ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", values...)
}

// installed returns the peers that can be run, and notes their versions.
func (b *bench) installed(peers []*peer) []*peer {
	return slices.DeleteFunc(slices.Clone(peers), func(p *peer) bool {
		version, err := p.version(b.built)
		if err != nil {
			b.say("%s: skipped: %v", p.name, err)
			b.set("skipped "+p.name, err.Error())
			return true
		}
		b.set("version "+p.name, version)
		return false
	})
}

// A task is measured at once. Tasks of a round are interleaved.
type task struct {
	name     string
	estimate time.Duration
	run      func(context.Context) error
}

func (b *bench) tasks(peers []*peer, groups []string, short bool) []task {
	var tasks []task
	sizes := b.sizes()
	for round := range b.plan.rounds {
		var ofRound []task
		add := func(group, name string, estimate time.Duration, run func(context.Context) error) {
			if slices.Contains(groups, group) {
				ofRound = append(ofRound, task{fmt.Sprintf("round %d: %s", round+1, name), estimate, run})
			}
		}
		for _, p := range peers {
			add(requests, "failed requests of "+p.name, b.plan.control+b.plan.upgrades+2*time.Second,
				func(ctx context.Context) error { return b.measureRequests(ctx, p, round) })
			if !short || p.name == ours || p.name == tableflip {
				add(latency, "latency of "+p.name, 2*b.plan.latency+time.Second,
					func(ctx context.Context) error { return b.measureLatency(ctx, p, round) })
			}
		}
		for _, n := range sizes {
			samples := b.plan.samples
			if n > 1000 {
				samples = (samples + 3) / 4
			}
			add(upgrade, fmt.Sprintf("upgrades with %d listeners", n),
				time.Duration(3*samples)*(5*time.Millisecond+time.Duration(n)*30*time.Microsecond)+time.Second,
				func(ctx context.Context) error { return b.measureUpgrade(ctx, n, samples, round) })
		}
		add(steady, "accepted connections", time.Duration(b.plan.samples)*200*time.Millisecond,
			func(ctx context.Context) error { return b.measureSteady(ctx, b.plan.samples, round) })
		add(imported, "binaries", time.Duration(b.plan.samples)*60*time.Millisecond,
			func(ctx context.Context) error { return b.measureImport(ctx, b.plan.samples, round) })
		passes := (b.plan.samples + 4) / 5
		add(draining, fmt.Sprintf("%d generations that drain", b.plan.draining),
			time.Duration(passes)*time.Duration(b.plan.draining+1)*(2*drainingPause+10*time.Millisecond),
			func(ctx context.Context) error { return b.measureDraining(ctx, b.plan.draining, passes, round) })
		rand.Shuffle(len(ofRound), func(i, j int) { ofRound[i], ofRound[j] = ofRound[j], ofRound[i] })
		tasks = append(tasks, ofRound...)
	}
	if slices.Contains(groups, series) {
		tasks = append(tasks, task{fmt.Sprintf("%d upgrades in a row", b.plan.series), time.Duration(b.plan.series) * 30 * time.Millisecond,
			func(ctx context.Context) error { return b.measureSeries(ctx, b.plan.series) }})
	}
	return tasks
}

// sizes are the plan's, as far as the limit of open files allows. In place of what
// it does not, there is the largest thousand that it does.
func (b *bench) sizes() []int {
	most, err := hand.MostListeners()
	if err != nil {
		b.say("%v", err)
		return nil
	}
	var sizes []int
	for _, n := range b.plan.sizes {
		if n > most {
			b.say("%d listeners: skipped: a process needs %d descriptors; see ulimit -n", n, hand.DescriptorsFor(n))
			n = most / 1000 * 1000
		}
		if n > 0 && !slices.Contains(sizes, n) {
			sizes = append(sizes, n)
		}
	}
	return sizes
}

// carryOut says what it does, and how long the rest will take.
func (b *bench) carryOut(ctx context.Context, tasks []task) error {
	begin := time.Now()
	var done, all time.Duration
	for _, t := range tasks {
		all += t.estimate
	}
	for i, t := range tasks {
		left := all - done
		if done > 0 {
			left = time.Duration(float64(left) * float64(time.Since(begin)) / float64(done))
		}
		b.say("[%d of %d, %v left] %s", i+1, len(tasks), left.Round(time.Second), t.name)
		if err := t.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
		done += t.estimate
	}
	return nil
}

// lost counts what this library must not lose, including upgrades.
func (b *bench) lost() float64 {
	lost := b.sum(latency, ours, withUpgrades, "failed") + b.sum(series, string(hand.Ours), "", "failed") +
		b.sum(draining, kept, "", "failed") +
		b.sum(handover, ours, "", "without a new process")
	for _, k := range kindNames {
		lost += b.sum(requests, ours, k, "control failed") + b.sum(requests, ours, k, "failed")
	}
	return lost
}

func (b *bench) save(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var content bytes.Buffer
	if err := b.write(&content); err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(dir, "results.csv"), content.Bytes(), 0o644), b.report(dir))
}
