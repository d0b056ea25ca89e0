//go:build linux

package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"example.com/tableflip/internal/load"
)

// latencyGrace is shorter than the grace of the other measures, so that an upgrade
// per second is possible: while the old process drains, the next must wait.
const latencyGrace = 250 * time.Millisecond

// The phases of the latency measure.
const (
	withoutUpgrades = "control"
	withUpgrades    = "upgrades"
)

// timelineBin is the resolution of the latency over time.
const timelineBin = 20 * time.Millisecond

// measureLatency compares the latency without upgrades, before and after, to that with
// one upgrade per second.
func (b *bench) measureLatency(ctx context.Context, p *peer, round int) error {
	s, err := p.start(ctx, b.built, latencyGrace)
	if err != nil {
		return err
	}
	defer s.stop()
	tr, err := startTraffic(ctx, s, steadyKindsFor(s))
	if err != nil {
		return err
	}
	defer tr.stop()
	load.Sleep(ctx, 300*time.Millisecond)
	start := tr.now()
	load.Sleep(ctx, b.plan.latency/2)
	begin := tr.now()
	var upgrades []time.Duration
	for i := range int(b.plan.latency / time.Second) {
		load.Sleep(ctx, begin+time.Duration(i)*time.Second+250*time.Millisecond-tr.now())
		upgrades = append(upgrades, tr.now())
		if err := p.upgrade(ctx, s, tr.serving()); err != nil {
			return fmt.Errorf("%s: upgrade: %w", p.name, err)
		}
	}
	load.Sleep(ctx, begin+b.plan.latency-tr.now())
	end := tr.now()
	load.Sleep(ctx, b.plan.latency/2)
	tr.stop()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	tr.mu.Lock()
	defer tr.mu.Unlock()
	took := make(map[string][]float64)
	lost := 0.0
	for _, r := range tr.requests {
		phase := withoutUpgrades
		switch {
		case r.begin < start:
			continue
		case r.end > begin && r.begin < end:
			phase = withUpgrades
		}
		if r.failure != "" {
			lost++
			continue
		}
		took[phase] = append(took[phase], milliseconds(r.end-r.begin))
	}
	for _, phase := range []string{withoutUpgrades, withUpgrades} {
		slices.Sort(took[phase])
		for _, q := range quantiles {
			b.add(latency, p.name, phase, q.name, "ms", round, quantile(took[phase], q.share))
		}
		b.add(latency, p.name, phase, "requests", "", round, float64(len(took[phase])))
	}
	b.add(latency, p.name, withUpgrades, "failed", "", round, lost)
	appeared := 0.0
	for _, process := range tr.processes {
		if process.seen > begin {
			appeared++
		}
	}
	b.add(latency, p.name, withUpgrades, "asked", "", round, float64(len(upgrades)))
	b.add(latency, p.name, withUpgrades, "new processes", "", round, appeared)
	if slices.Contains(timelinePeers, p.name) {
		b.drawTimeline(p, round, tr, start, upgrades)
	}
	return nil
}

var quantiles = []struct {
	name  string
	share float64
}{{"p50", 0.5}, {"p99", 0.99}, {"p99.9", 0.999}, {"max", 1}}

// quantile returns a value that the share q of all values does not exceed.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	return sorted[max(0, int(math.Ceil(q*float64(len(sorted))))-1)]
}

// drawTimeline keeps the slowest answer of each moment, of the last round only.
func (b *bench) drawTimeline(p *peer, round int, tr *traffic, start time.Duration, upgrades []time.Duration) {
	b.rows = slices.DeleteFunc(b.rows, func(row row) bool { return row.measure == timeline && row.peer == p.name })
	slowest := make(map[time.Duration]float64)
	failed := make(map[time.Duration]float64)
	for _, r := range tr.requests {
		if r.begin < start {
			continue
		}
		at := (r.begin - start).Truncate(timelineBin)
		if r.failure != "" {
			failed[at]++
		} else {
			slowest[at] = max(slowest[at], milliseconds(r.end-r.begin))
		}
	}
	add := func(metric, unit string, at time.Duration, value float64) {
		b.add(timeline, p.name, strconv.Itoa(int(at.Milliseconds())), metric, unit, round, value)
	}
	for at := time.Duration(0); at < 2*b.plan.latency; at += timelineBin {
		if slowest[at] > 0 {
			add("slowest", "ms", at, slowest[at])
		}
		if failed[at] > 0 {
			add("failed", "", at, failed[at])
		}
	}
	for _, at := range upgrades {
		add("upgrade", "", at-start, 1)
	}
}
