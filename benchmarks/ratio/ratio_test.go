package ratio_test

import (
	"math/rand/v2"
	"testing"

	"example.com/tableflip/benchmarks/ratio"
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
		_, low, high := ratio.OfMedians(a, b)
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
