//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	hand "example.com/tableflip/benchmarks/handover"
	"example.com/tableflip/internal/load"
)

// This file measures what needs no HTTP: chains of processes that hand listeners
// over, and accept on the first of them.

func (b *bench) startChain(c hand.Contender, n int) (*hand.Chain, error) {
	return hand.Start(filepath.Join(b.built, "chain"), c, n)
}

// shuffled returns the contenders in random order, so that none is always the first.
func shuffled() []hand.Contender {
	contenders := slices.Clone(hand.Contenders)
	rand.Shuffle(len(contenders), func(i, j int) { contenders[i], contenders[j] = contenders[j], contenders[i] })
	return contenders
}

// startChains starts one chain of each contender, and upgrades it, so that all its
// listeners are inherited.
func (b *bench) startChains(n int, upgraded func(hand.Contender) bool) (chains map[hand.Contender]*hand.Chain, end func(), err error) {
	chains = make(map[hand.Contender]*hand.Chain)
	end = func() {
		for c, ch := range chains {
			if err := ch.Close(); err != nil {
				b.say("%s: %v", c, err)
			}
		}
	}
	for _, c := range hand.Contenders {
		if chains[c], err = b.startChain(c, n); err != nil {
			delete(chains, c)
			end()
			return nil, nil, fmt.Errorf("%s with %d listeners: %w", c, n, err)
		}
		if upgraded(c) {
			if _, err := chains[c].Upgrade(); err != nil {
				end()
				return nil, nil, fmt.Errorf("%s with %d listeners: %w", c, n, err)
			}
		}
	}
	return chains, end, nil
}

func all(hand.Contender) bool { return true }

// measureUpgrade times upgrades with n listeners, and what one process holds then.
func (b *bench) measureUpgrade(ctx context.Context, n, samples, round int) error {
	chains, end, err := b.startChains(n, all)
	if err != nil {
		return err
	}
	defer end()
	about := strconv.Itoa(n)
	for range samples {
		for _, c := range shuffled() {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			t, err := chains[c].Upgrade()
			if err != nil {
				return fmt.Errorf("%s with %d listeners: %w", c, n, err)
			}
			b.add(upgrade, string(c), about, "ready", "ms", round, milliseconds(t.Ready))
			b.add(upgrade, string(c), about, "commit", "ms", round, milliseconds(t.Commit))
			b.add(upgrade, string(c), about, "serve", "ms", round, milliseconds(t.Serve))
		}
	}
	for c, ch := range chains {
		use, err := useOf(ch.Serving.PID)
		if err != nil {
			return err
		}
		b.add(memory, string(c), about, "resident", "KiB", round, use.resident)
		b.add(memory, string(c), about, "descriptors", "", round, use.descriptors)
	}
	return nil
}

// use is what a process holds.
type use struct{ resident, descriptors float64 }

func useOf(pid int) (u use, err error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return u, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "RssAnon:"); ok { // what is its own
			if _, err := fmt.Sscan(value, &u.resident); err != nil {
				return u, err
			}
		}
	}
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	u.descriptors = float64(len(fds))
	return u, err
}

// measureSteady has each contender accept connections: the floor with a bare
// net.Listen, the others after an upgrade.
func (b *bench) measureSteady(ctx context.Context, samples, round int) error {
	chains, end, err := b.startChains(1, func(c hand.Contender) bool { return c != hand.Floor })
	if err != nil {
		return err
	}
	defer end()
	const clients, connections = 2, 200
	for range samples {
		for _, c := range shuffled() {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			ch := chains[c]
			usedBefore, err := ch.CPU()
			if err != nil {
				return err
			}
			var group sync.WaitGroup
			var failed atomic.Pointer[error]
			begin := time.Now()
			for range clients {
				group.Go(func() {
					if err := hand.Connect(ch.Serving.TCP, connections); err != nil {
						failed.Store(&err)
					}
				})
			}
			group.Wait()
			took := time.Since(begin)
			if err := failed.Load(); err != nil {
				return *err
			}
			used, err := ch.CPU()
			if err != nil {
				return err
			}
			b.add(steady, string(c), "", "accepted", "1/s", round, clients*connections/took.Seconds())
			b.add(steady, string(c), "", "CPU time", "µs", round, float64((used-usedBefore).Microseconds())/(clients*connections))
		}
	}
	return nil
}

// measureSeries upgrades each contender many times, while clients connect.
func (b *bench) measureSeries(ctx context.Context, upgrades int) error {
	chains, end, err := b.startChains(4, all)
	if err != nil {
		return err
	}
	defer end()
	ctx, cancel := context.WithCancel(ctx)
	var wait sync.WaitGroup
	defer wait.Wait()
	defer cancel()
	sent := make(map[hand.Contender]*atomic.Int64)
	failed := make(map[hand.Contender]*atomic.Int64)
	for c, ch := range chains {
		sent[c], failed[c] = new(atomic.Int64), new(atomic.Int64)
		addr := ch.Serving.TCP
		wait.Go(func() {
			for load.Sleep(ctx, rand.N(4*time.Millisecond)) {
				sent[c].Add(1)
				if hand.Greeted(addr) != nil {
					failed[c].Add(1)
				}
			}
		})
	}
	every := max(1, upgrades/100)
	for n := range upgrades {
		for _, c := range shuffled() {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			t, err := chains[c].Upgrade()
			if err != nil {
				return fmt.Errorf("%s, upgrade %d in a row: %w", c, n+1, err)
			}
			b.add(series, string(c), "", "commit", "ms", n, milliseconds(t.Commit))
			if n%every == 0 || n == upgrades-1 {
				use, err := useOf(chains[c].Serving.PID)
				if err != nil {
					return err
				}
				b.add(series, string(c), "", "resident", "KiB", n, use.resident)
				b.add(series, string(c), "", "descriptors", "", n, use.descriptors)
			}
		}
	}
	cancel()
	wait.Wait()
	for c := range chains {
		b.add(series, string(c), "", "connections", "", upgrades, float64(sent[c].Load()))
		b.add(series, string(c), "", "failed", "", upgrades, float64(failed[c].Load()))
	}
	return nil
}
