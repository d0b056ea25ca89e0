// Package ratio compares what was measured side by side.
package ratio

import (
	"math/rand/v2"
	"slices"
)

// OfMedians returns the ratio of the median of a to the median of b, and its 95% interval by
// the percentile bootstrap. a[i] and b[i] were measured in the same round, so that rounds
// are drawn, not values: what disturbed a round disturbed both.
func OfMedians(a, b []float64) (ratio, low, high float64) {
	const draws = 4000
	ratio = Median(slices.Clone(a)) / Median(slices.Clone(b))
	random := rand.New(rand.NewPCG(1, 1)) // the same samples give the same interval
	drawnA, drawnB := make([]float64, len(a)), make([]float64, len(b))
	ratios := make([]float64, draws)
	for i := range ratios {
		for j := range drawnA {
			round := random.IntN(len(a))
			drawnA[j], drawnB[j] = a[round], b[round]
		}
		ratios[i] = Median(drawnA) / Median(drawnB)
	}
	slices.Sort(ratios)
	return ratio, ratios[draws*25/1000], ratios[draws*975/1000-1]
}

// Median sorts the values.
func Median(values []float64) float64 {
	slices.Sort(values)
	middle := len(values) / 2
	if len(values)%2 == 1 {
		return values[middle]
	}
	return (values[middle-1] + values[middle]) / 2
}
