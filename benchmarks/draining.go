//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strconv"
	"time"

	hand "example.com/tableflip/benchmarks/handover"
	"example.com/tableflip/internal/load"
)

// This file measures generations that drain at once. Only this library can do that: with
// tableflip, an upgrade is an error while the parent lives.

// What is upgraded in turns: a chain all of whose generations drain, because a client keeps
// a connection to each, and one of which none does.
const (
	kept  = "kept"
	ended = "ended"
)

// drains is what is measured of the generations that drain, in place of their number.
const drains = "drains"

// drainingPause is how long whoever was told of an upgrade has to deal with that.
const drainingPause = 20 * time.Millisecond

// measureDraining has one generation more drain with each upgrade, up to most, several
// times.
func (b *bench) measureDraining(ctx context.Context, most, passes, round int) error {
	for range passes {
		if err := b.drainAtOnce(ctx, most, round); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) drainAtOnce(ctx context.Context, most, round int) error {
	keeping, err := hand.StartDraining(filepath.Join(b.built, "chain"), most)
	if err != nil {
		return err
	}
	var connections []*hand.Kept
	defer func() {
		for _, c := range connections {
			c.Close()
		}
		if err := keeping.Close(); err != nil {
			b.say("%s: %v", kept, err)
		}
	}()
	ending, err := b.startChain(hand.Ours, 1)
	if err != nil {
		return err
	}
	defer func() {
		if err := ending.Close(); err != nil {
			b.say("%s: %v", ended, err)
		}
	}()
	for _, ch := range []*hand.Chain{keeping, ending} { // from here on, all is inherited
		if _, err := ch.Upgrade(); err != nil {
			return err
		}
	}

	chains := map[string]*hand.Chain{kept: keeping, ended: ending}
	for n := range most + 1 {
		about := strconv.Itoa(n)
		if !load.Sleep(ctx, drainingPause) { // so that the first, which nothing keeps, has ended
			return ctx.Err()
		}
		for name, ch := range chains {
			if err := b.addUse(name, about, round, ch.Serving.PID); err != nil {
				return err
			}
		}
		conn, err := keeping.Keep()
		if err != nil {
			return err
		}
		connections = append(connections, conn)
		b.ask(connections, round)
		names := []string{kept, ended}
		rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		for _, name := range names {
			if !load.Sleep(ctx, drainingPause) {
				return ctx.Err()
			}
			t, err := chains[name].Upgrade()
			if err != nil {
				return fmt.Errorf("%s, upgrade while %d generations drain: %w", name, n, err)
			}
			b.add(draining, name, about, "commit", "ms", round, milliseconds(t.Commit))
			b.add(draining, name, about, "serve", "ms", round, milliseconds(t.Serve))
		}
		b.ask(connections, round)
	}
	for _, c := range connections {
		if err := b.addUse(kept, drains, round, c.PID); err != nil {
			return err
		}
	}
	return nil
}

// addUse notes what a process holds.
func (b *bench) addUse(name, about string, round, pid int) error {
	use, err := useOf(pid)
	if err != nil {
		return err
	}
	b.add(draining, name, about, "resident", "KiB", round, use.resident)
	b.add(draining, name, about, "descriptors", "", round, use.descriptors)
	return nil
}

// ask has all generations answer on the connections that they have kept.
func (b *bench) ask(connections []*hand.Kept, round int) {
	failed := 0.0
	for _, c := range connections {
		if err := c.Ask(); err != nil {
			b.say("%v", err)
			failed++
		}
	}
	b.add(draining, kept, "", "asked", "", round, float64(len(connections)))
	b.add(draining, kept, "", "failed", "", round, failed)
}
