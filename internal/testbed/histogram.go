package main

import (
	"math"
	"time"
)

// histogram counts durations in buckets that are 2% wide, from 1 µs on.
type histogram struct {
	buckets [1024]int
	n       int
	max     time.Duration
}

const bucketWidth = 0.02

func (h *histogram) add(d time.Duration) {
	i := 0
	if d > time.Microsecond {
		i = int(math.Log(float64(d)/float64(time.Microsecond)) / bucketWidth)
	}
	h.buckets[min(i, len(h.buckets)-1)]++
	h.n++
	h.max = max(h.max, d)
}

// quantile returns a duration that the share q of all durations does not exceed.
func (h *histogram) quantile(q float64) time.Duration {
	rank := int(math.Ceil(q * float64(h.n)))
	for i, n := range h.buckets {
		if rank -= n; rank <= 0 && h.n > 0 {
			upper := time.Duration(math.Exp(float64(i+1)*bucketWidth) * float64(time.Microsecond))
			return min(upper, h.max)
		}
	}
	return 0
}
