//go:build linux

package main

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"
)

// importers are servers that differ in what they import, the bare one first.
var importers = []string{"restart", "ours-shutdown", ours, tableflip}

// measureImport takes the size of the servers' binaries, and the time from the start
// of a process to the first connection that it lets in.
func (b *bench) measureImport(ctx context.Context, samples, round int) error {
	for _, name := range importers {
		info, err := os.Stat(filepath.Join(b.built, name))
		if err != nil {
			return err
		}
		b.add(imported, name, "", "size", "KiB", round, float64(info.Size())/1024)
	}
	for range samples {
		for _, i := range rand.Perm(len(importers)) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			took, err := b.startOnce(ctx, peerOf(importers[i]))
			if err != nil {
				return err
			}
			b.add(imported, importers[i], "", "start", "ms", round, milliseconds(took))
		}
	}
	return nil
}

func (b *bench) startOnce(ctx context.Context, p *peer) (time.Duration, error) {
	s, err := p.start(ctx, b.built, time.Second)
	if err != nil {
		return 0, err
	}
	defer s.stop()
	return s.startup, nil
}
