//go:build linux

// Command compare tells whether one version of this library upgrades more slowly than
// another:
//
//	go run ./compare -other DIR -pairs 400 -listeners 1,10
//
// DIR is another checkout, such as a git worktree. The same program is built with
// each of the two, and replaced by them, by github.com/cloudflare/tableflip and by a
// bare exec in turns. For each number of listeners and each measure, compare prints
// the medians, and the ratio of this library's to each of them with its 95% interval.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	hand "example.com/tableflip/benchmarks/handover"
	"example.com/tableflip/benchmarks/ratio"
	"golang.org/x/sys/unix"
)

// A contender is a way to hand over, in a binary.
type contender struct {
	name    string
	way     hand.Contender
	library string // directory of this library
	binary  string
}

// The measures.
const (
	call   = "call"   // of Upgrade, until it returns
	serves = "serves" // from the command until the new process's Ready has returned
	inARow = "in a row"
)

var measures = []string{call, serves, inARow}

type config struct {
	this, other string // directories
	pairs       int
	listeners   []int
	chain       int
	benchstat   io.Writer // for all samples, or nil
}

func main() {
	var cfg config
	flag.StringVar(&cfg.this, "this", "..", "`directory` of the version that is compared to the others")
	flag.StringVar(&cfg.other, "other", "", "`directory` of another version of this library; without, this one is compared to the rest")
	flag.IntVar(&cfg.pairs, "pairs", 100, "`number` of samples of each contender")
	flag.IntVar(&cfg.chain, "chain", 8, "`number` of upgrades in a row without a pause; 0 leaves them out")
	listeners := flag.String("listeners", "1,10,400", "`numbers` of listeners")
	benchstat := flag.String("benchstat", "", "`file` for all samples, as benchstat reads them (-col /by)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	var err error
	if cfg.listeners, err = parseNumbers(*listeners); err == nil && *benchstat != "" {
		cfg.benchstat, err = os.Create(*benchstat)
	}
	if err == nil {
		err = run(ctx, cfg, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(1)
	}
}

func parseNumbers(text string) (numbers []int, err error) {
	most, err := hand.MostListeners()
	if err != nil {
		return nil, err
	}
	for word := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(word)
		if err != nil {
			return nil, err
		}
		if n < 1 || n > most {
			return nil, fmt.Errorf("%d listeners: it must be from 1 to %d, what ulimit -n allows", n, most)
		}
		numbers = append(numbers, n)
	}
	return numbers, nil
}

func run(ctx context.Context, cfg config, out io.Writer) error {
	dir, err := os.MkdirTemp("", "compare")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	contenders, err := buildAll(ctx, cfg, dir)
	if err != nil {
		return err
	}

	fmt.Fprint(out, "| listeners | | this, ms |")
	for _, c := range contenders[1:] {
		fmt.Fprintf(out, " / %s |", c.name)
	}
	fmt.Fprintf(out, "\n| --- | --- |%s\n", strings.Repeat(" --- |", len(contenders)))
	for _, n := range cfg.listeners { // a long run shows what it has
		samples, err := measure(ctx, cfg, contenders, n)
		if err != nil {
			return fmt.Errorf("%d listeners: %w", n, err)
		}
		for _, m := range measures {
			if len(samples[m][0]) > 0 {
				report(out, n, m, samples[m])
			}
			if cfg.benchstat != nil {
				list(cfg.benchstat, n, m, contenders, samples[m])
			}
		}
	}
	return nil
}

// report writes the line of one measure. Samples are in the order of contenders.
func report(w io.Writer, n int, measure string, samples [][]float64) {
	fmt.Fprintf(w, "| %d | %s | %.2f |", n, measure, ratio.Median(slices.Clone(samples[0])))
	for _, other := range samples[1:] {
		ratio, low, high := ratio.OfMedians(samples[0], other)
		fmt.Fprintf(w, " %.2f (%.2f–%.2f) |", ratio, low, high)
	}
	fmt.Fprintln(w)
}

// list writes all samples.
func list(w io.Writer, n int, measure string, contenders []contender, samples [][]float64) {
	unspaced := strings.NewReplacer(" ", "-")
	for i, c := range contenders {
		for _, sample := range samples[i] {
			fmt.Fprintf(w, "BenchmarkUpgrade/%s/listeners=%d/by=%s 1 %.0f ns/op\n",
				unspaced.Replace(measure), n, unspaced.Replace(c.name), 1e6*sample)
		}
	}
}

// renewEvery is after how many rounds the binaries are copied anew.
const renewEvery = 5

// measure takes cfg.pairs samples of each contender and measure with n listeners. In
// each round, everybody has one turn, in random order.
func measure(ctx context.Context, cfg config, contenders []contender, n int) (samples map[string][][]float64, err error) {
	samples = make(map[string][][]float64)
	for _, m := range measures {
		samples[m] = make([][]float64, len(contenders))
	}
	chains := make([]*hand.Chain, len(contenders))
	defer func() {
		for _, ch := range chains {
			if ch != nil {
				err = errors.Join(err, ch.Close())
			}
		}
	}()
	for i, c := range contenders {
		if chains[i], err = hand.Start(c.binary, c.way, n); err != nil {
			return nil, fmt.Errorf("%s: %w", c.name, err)
		}
		if _, err := chains[i].Upgrade(); err != nil { // from here on, all is inherited
			return nil, fmt.Errorf("%s: %w", c.name, err)
		}
	}

	for round := range cfg.pairs {
		if round%renewEvery == 0 {
			if err := renew(contenders); err != nil {
				return nil, err
			}
		}
		for _, i := range rand.Perm(len(chains)) {
			if err := awaitIdle(ctx, chains); err != nil {
				return nil, err
			}
			t, err := chains[i].Upgrade()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", contenders[i].name, err)
			}
			samples[call][i] = append(samples[call][i], milliseconds(t.Call))
			samples[serves][i] = append(samples[serves][i], milliseconds(t.Serve))
		}
		if cfg.chain == 0 {
			continue
		}
		for _, i := range rand.Perm(len(chains)) {
			if err := awaitIdle(ctx, chains); err != nil {
				return nil, err
			}
			took, err := chains[i].UpgradeInARow(cfg.chain)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", contenders[i].name, err)
			}
			samples[inARow][i] = append(samples[inARow][i], milliseconds(took)/float64(cfg.chain))
		}
	}
	return samples, nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// awaitIdle waits until no process uses the CPU: what a new process does after Ready
// must not slow down the next contender. It gives up after a second, because another
// program may use the CPU.
func awaitIdle(ctx context.Context, chains []*hand.Chain) error {
	const tick, idle = 2 * time.Millisecond, 100 * time.Microsecond
	begin, before := time.Now(), time.Duration(0)
	for time.Since(begin) < time.Second {
		used := time.Duration(0)
		for _, ch := range chains {
			var clock unix.Timespec
			// See clock_getcpuclockid(3) and CPUCLOCK_SCHED in the kernel.
			if err := unix.ClockGettime(int32(^ch.Serving.PID<<3|2), &clock); err != nil {
				return err
			}
			used += time.Duration(clock.Nano())
		}
		if used-before < idle {
			return nil
		}
		before = used
		select {
		case <-time.After(tick):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
