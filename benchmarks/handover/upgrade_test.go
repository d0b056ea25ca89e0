//go:build linux

package handover

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"
)

// BenchmarkUpgrade measures, in the process that is replaced, how long Upgrade
// takes with this many TCP listeners (and one UDP socket). Every iteration
// replaces one process of each contender, in random order, so that a disturbance
// from outside meets all of them. Reported are the medians, and the ratios of
// ours to the others'.
func BenchmarkUpgrade(b *testing.B) {
	for _, n := range []int{1, 4, 400, 4000} {
		b.Run(fmt.Sprintf("listeners=%d", n), func(b *testing.B) {
			if most, err := MostListeners(); err != nil {
				b.Fatal(err)
			} else if n > most {
				// The testing package shows this only to those who ask, by -v.
				fmt.Fprintf(os.Stderr, "%s: skipped: a process needs %d descriptors; see ulimit -n\n", b.Name(), DescriptorsFor(n))
				b.SkipNow() // as it says above
			}
			chains := make([]*Chain, len(Contenders))
			for i, c := range Contenders {
				chains[i] = start(b, c, n)
				upgrade(b, chains[i]) // from here on, all is inherited
			}
			took := make([][]time.Duration, len(Contenders))
			for b.Loop() {
				for _, i := range rand.Perm(len(Contenders)) {
					took[i] = append(took[i], upgrade(b, chains[i]))
				}
			}
			report(b, "", "ms", time.Millisecond, took)
		})
	}
}

// report reports the medians of what the contenders took of something, in this
// unit, and the ratios of ours to the others', instead of b's own figure.
func report(b *testing.B, something, unitName string, unit time.Duration, took [][]time.Duration) {
	first := median(took[0])
	for i, c := range Contenders {
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
