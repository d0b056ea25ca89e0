//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"example.com/tableflip/internal/load"
)

// measureRequests counts the failed requests of one peer, without and then with
// upgrades, and observes who answers.
func (b *bench) measureRequests(ctx context.Context, p *peer, round int) error {
	s, err := p.start(ctx, b.built, time.Second)
	if err != nil {
		return err
	}
	defer s.stop()
	tr, err := startTraffic(ctx, s, kindsFor(s))
	if err != nil {
		return err
	}
	defer tr.stop()
	control := tr.now()
	load.Sleep(ctx, b.plan.control)
	var upgrades []time.Duration
	for end := tr.now() + b.plan.upgrades; tr.now() < end && ctx.Err() == nil; {
		begin := tr.now()
		upgrades = append(upgrades, begin)
		if err := p.upgrade(ctx, s, tr.serving()); err != nil {
			return fmt.Errorf("%s: upgrade: %w", p.name, err)
		}
		tr.awaitHandover(ctx, begin)
		load.Sleep(ctx, 200*time.Millisecond+rand.N(100*time.Millisecond))
	}
	tr.stop()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	tr.mu.Lock()
	defer tr.mu.Unlock()
	b.countRequests(p, round, tr, control, upgrades)
	b.observeHandovers(p, round, tr, upgrades)
	return nil
}

// handoverLimit is how long an old process is waited for: more than it may drain.
const handoverLimit = 8 * time.Second

func (tr *traffic) awaitHandover(ctx context.Context, begin time.Duration) {
	for tr.now() < begin+handoverLimit {
		if appeared, gone := tr.handedOver(begin); appeared && gone {
			return
		}
		if !load.Sleep(ctx, 5*time.Millisecond) {
			return
		}
	}
}

// countRequests tells requests before the first upgrade from those after it.
func (b *bench) countRequests(p *peer, round int, tr *traffic, control time.Duration, upgrades []time.Duration) {
	type count struct{ sent, failed, opened float64 }
	counts := make(map[string]*[2]count)
	categories := make(map[string]float64)
	for _, r := range tr.requests {
		if r.begin < control {
			continue
		}
		if counts[r.kind] == nil {
			counts[r.kind] = new([2]count)
		}
		phase := 0
		if r.end > upgrades[0] {
			phase = 1
		}
		c := &counts[r.kind][phase]
		c.sent++
		c.opened += float64(r.opened)
		if r.failure != "" {
			c.failed++
			categories[r.failure]++
		}
	}
	for _, k := range kindNames {
		c := counts[k]
		if c == nil {
			continue // it lacks that
		}
		b.add(requests, p.name, k, "control sent", "", round, c[0].sent)
		b.add(requests, p.name, k, "control failed", "", round, c[0].failed)
		b.add(requests, p.name, k, "sent", "", round, c[1].sent)
		b.add(requests, p.name, k, "failed", "", round, c[1].failed)
		b.add(requests, p.name, k, "opened", "", round, c[1].opened)
	}
	for category, n := range categories {
		b.add(failures, p.name, category, "failed", "", round, n)
	}
}

// observeHandovers follows the answers across each upgrade.
func (b *bench) observeHandovers(p *peer, round int, tr *traffic, upgrades []time.Duration) {
	for i, begin := range upgrades {
		end := tr.now()
		if i+1 < len(upgrades) {
			end = upgrades[i+1]
		}
		old := make(map[int]*process)
		var appeared *process
		for _, process := range tr.processes {
			switch {
			case process.seen <= begin:
				old[process.pid] = process
			case process.seen > begin && process.seen <= end && appeared == nil:
				appeared = process
			}
		}
		b.add(handover, p.name, "", "upgrades", "", round, 1)
		if appeared == nil {
			b.add(handover, p.name, "", "without a new process", "", round, 1)
			continue
		}
		b.add(handover, p.name, "", "new answers", "ms", round, milliseconds(appeared.seen-begin))
		var last, exit time.Duration
		remains := 0.0
		for _, process := range old {
			exit = max(exit, process.exit)
			if process.exit == 0 || process.exit > end {
				remains = 1
			}
		}
		for _, r := range tr.requests {
			if old[r.pid] != nil && r.end <= end {
				last = max(last, r.end)
			}
		}
		b.add(handover, p.name, "", "old answers last", "ms", round, max(0, milliseconds(last-begin)))
		if p.inProcess {
			continue
		}
		b.add(handover, p.name, "", "old remains", "", round, remains)
		if remains == 0 {
			b.add(handover, p.name, "", "old exits", "ms", round, milliseconds(exit-begin))
		}
	}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
