//go:build linux

package main

import (
	"context"
	"fmt"
	"time"
)

// measureRequests counts the failed requests of one peer, without and then with
// upgrades, and observes who answers.
func (b *bench) measureRequests(ctx context.Context, p *peer, round int) error {
	s, err := p.start(ctx, b.built, time.Second)
	if err != nil {
		return err
	}
	defer s.stop()
	l, err := startLoad(ctx, s, kinds)
	if err != nil {
		return err
	}
	defer l.stop()
	control := l.now()
	sleep(ctx, b.plan.control)
	var upgrades []time.Duration
	for end := l.now() + b.plan.upgrades; l.now() < end && ctx.Err() == nil; {
		begin := l.now()
		upgrades = append(upgrades, begin)
		if err := p.upgrade(ctx, s, l.serving()); err != nil {
			return fmt.Errorf("%s: upgrade: %w", p.name, err)
		}
		l.awaitHandover(ctx, begin)
		sleep(ctx, 200*time.Millisecond+upTo(100)())
	}
	l.stop()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	b.countRequests(p, round, l, control, upgrades)
	b.observeHandovers(p, round, l, upgrades)
	return nil
}

// handoverLimit is how long an old process is waited for: more than it may drain.
const handoverLimit = 8 * time.Second

func (l *load) awaitHandover(ctx context.Context, begin time.Duration) {
	for l.now() < begin+handoverLimit {
		if appeared, gone := l.handedOver(begin); appeared && gone {
			return
		}
		if !sleep(ctx, 5*time.Millisecond) {
			return
		}
	}
}

// countRequests tells requests before the first upgrade from those after it.
func (b *bench) countRequests(p *peer, round int, l *load, control time.Duration, upgrades []time.Duration) {
	type count struct{ sent, failed float64 }
	counts := make(map[string]*[2]count)
	categories := make(map[string]float64)
	for _, r := range l.requests {
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
		if r.failure != "" {
			c.failed++
			categories[r.failure]++
		}
	}
	for _, k := range kinds {
		c := counts[k.name]
		if c == nil {
			continue // it lacks that
		}
		b.add(requests, p.name, k.name, "control sent", "", round, c[0].sent)
		b.add(requests, p.name, k.name, "control failed", "", round, c[0].failed)
		b.add(requests, p.name, k.name, "sent", "", round, c[1].sent)
		b.add(requests, p.name, k.name, "failed", "", round, c[1].failed)
	}
	for category, n := range categories {
		b.add(failures, p.name, category, "failed", "", round, n)
	}
}

// observeHandovers follows the answers across each upgrade.
func (b *bench) observeHandovers(p *peer, round int, l *load, upgrades []time.Duration) {
	for i, begin := range upgrades {
		end := l.now()
		if i+1 < len(upgrades) {
			end = upgrades[i+1]
		}
		old := make(map[int]*process)
		var appeared *process
		for _, process := range l.processes {
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
		for _, r := range l.requests {
			if old[r.pid] != nil && r.end <= end {
				last = max(last, r.end)
			}
		}
		b.add(handover, p.name, "", "old answers last", "ms", round, max(0, milliseconds(last-begin)))
		b.add(handover, p.name, "", "old remains", "", round, remains)
		if remains == 0 {
			b.add(handover, p.name, "", "old exits", "ms", round, milliseconds(exit-begin))
		}
	}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
