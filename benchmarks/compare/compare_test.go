//go:build linux

package main

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"
)

// The interval must contain the true ratio about as often as it says, and one that is
// not true seldom: were rounds not drawn as such, what is common to both would widen it.
func TestIntervalContainsTheRatio(t *testing.T) {
	const runs, rounds, slower = 200, 60, 1.05
	random := rand.New(rand.NewPCG(1, 2))
	contains, excludes, wrong := 0, 0, 0
	for range runs {
		var a, b []float64
		for range rounds {
			disturbance := 1 + random.ExpFloat64() // of a whole round
			a = append(a, slower*disturbance*(1+0.02*random.NormFloat64()))
			b = append(b, disturbance*(1+0.02*random.NormFloat64()))
		}
		_, low, high := ratioOfMedians(a, b)
		if low <= slower && slower <= high {
			contains++
		}
		if low > 1 {
			excludes++
		}
		if high < 1 {
			wrong++
		}
	}
	if contains < runs*90/100 || excludes < runs/2 || wrong > 0 {
		t.Errorf("of %d intervals, %d contain the ratio, %d are above 1, %d below", runs, contains, excludes, wrong)
	}
}

// Two builds of the same library, and the rest, are measured, and each in every measure.
func TestCompare(t *testing.T) {
	t.Chdir("..")
	var out bytes.Buffer
	cfg := config{this: "..", other: "..", pairs: 2, listeners: []int{1, 3}, chain: 2}
	if err := run(t.Context(), cfg, &out); err != nil {
		t.Fatal(err)
	}
	for _, by := range []string{"this", "other", "tableflip", "bare exec"} {
		if n := strings.Count(out.String(), " "+by+"  "); n != len(cfg.listeners)*len(measures) {
			t.Errorf("%d lines are about %q, want %d:\n%s", n, by, len(cfg.listeners)*len(measures), &out)
		}
	}
}

// A directory that does not hold the library is an error, and not compared to itself.
func TestCompareWithNothing(t *testing.T) {
	t.Chdir("..")
	if err := run(t.Context(), config{this: "..", other: t.TempDir(), pairs: 1, listeners: []int{1}}, t.Output()); err == nil {
		t.Error("want an error")
	}
}
