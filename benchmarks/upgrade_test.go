//go:build unix

package benchmarks

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"
)

// The first of the contenders is the one that is compared to the others.
var contenders = []contender{contenderOurs, contenderTableflip, contenderFloor}

// BenchmarkUpgrade measures, in the process that is replaced, how long Upgrade
// takes with this many TCP listeners (and one UDP socket). Every iteration
// replaces one process of each contender, in random order, so that a disturbance
// from outside meets all of them. Reported are the medians, and the ratios of
// ours to the others'.
func BenchmarkUpgrade(b *testing.B) {
	for _, n := range []int{1, 4, 400, 4000} {
		b.Run(fmt.Sprintf("listeners=%d", n), func(b *testing.B) {
			needDescriptors(b, n)
			chains := make([]*chain, len(contenders))
			for i, c := range contenders {
				chains[i] = startChain(b, c, n)
				chains[i].upgrade() // from here on, all is inherited
			}
			took := make([][]time.Duration, len(contenders))
			for b.Loop() {
				for _, i := range rand.Perm(len(contenders)) {
					took[i] = append(took[i], chains[i].upgrade())
				}
			}
			report(b, "", "ms", time.Millisecond, took)
		})
	}
}

// needDescriptors skips b if a process may not have as many descriptors as n
// listeners need: in a child that is about to be started, the parent's duplicates
// and the listeners, and os/exec's own duplicates of what is passed on.
func needDescriptors(b *testing.B, n int) {
	need := uint64(3*n + 50)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		b.Fatal(err)
	}
	if uint64(limit.Cur) < need {
		// The testing package shows this only to those who ask, by -v.
		fmt.Fprintf(os.Stderr, "%s: skipped: a process needs %d descriptors, and ulimit -n is %d\n", b.Name(), need, limit.Cur)
		b.SkipNow()
	}
}

// report reports the medians of what the contenders took of something, in this
// unit, and the ratios of ours to the others', instead of b's own figure.
func report(b *testing.B, something, unitName string, unit time.Duration, took [][]time.Duration) {
	first := median(took[0])
	for i, c := range contenders {
		other := median(took[i])
		b.ReportMetric(float64(other)/float64(unit), fmt.Sprintf("%s%s-%s", something, c, unitName))
		if i > 0 {
			b.ReportMetric(float64(first)/float64(other), fmt.Sprintf("%sx-%s", something, c))
		}
	}
	b.ReportMetric(0, "ns/op")
}

func median(sample []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(sample))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}
