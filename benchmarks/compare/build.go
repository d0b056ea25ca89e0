//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"

	hand "example.com/tableflip/benchmarks/handover"
)

const module = "example.com/tableflip"

// buildAll builds the program for each contender. The first is the one that is compared
// to the others. Each has a file of its own, because what several run stays in the
// processor's caches. Except for the library's version, they are the same, so that
// starting them costs the same.
func buildAll(ctx context.Context, cfg config, dir string) ([]contender, error) {
	contenders := []contender{
		{name: "this", way: hand.Ours, library: cfg.this},
		{name: "other", way: hand.Ours, library: cfg.other},
		{name: "tableflip", way: hand.Tableflip, library: cfg.this},
		{name: "bare exec", way: hand.Floor, library: cfg.this},
	}
	contenders = slices.DeleteFunc(contenders, func(c contender) bool { return c.library == "" })
	for i := range contenders {
		c := &contenders[i]
		c.binary = filepath.Join(dir, strconv.Itoa(i))
		if err := build(ctx, c.library, c.built()); err != nil {
			return nil, err
		}
	}
	return contenders, renew(contenders)
}

// built is where the linker has put the contender's binary.
func (c contender) built() string { return c.binary + ".built" }

// renew copies each binary anew. Where its pages are in memory makes an upgrade faster or
// slower by up to a twentieth. One that the linker has written is slower than a copy, and
// no two copies are alike.
func renew(contenders []contender) error {
	for _, c := range contenders {
		content, err := os.ReadFile(c.built())
		if err != nil {
			return err
		}
		next := c.binary + ".new"
		if err := os.WriteFile(next, content, 0o700); err != nil {
			return err
		}
		if err := os.Rename(next, c.binary); err != nil {
			return err
		}
	}
	return nil
}

// build builds the program at path with the library in the directory, by a copy of
// go.mod in which it takes the place of this one.
func build(ctx context.Context, library, path string) error {
	library, err := filepath.Abs(library)
	if err != nil {
		return err
	}
	modFile := path + ".mod"
	for name, copied := range map[string]string{"go.mod": modFile, "go.sum": path + ".sum"} {
		content, err := os.ReadFile(name)
		if err != nil {
			return fmt.Errorf("%w (run this in the folder benchmarks)", err)
		}
		if err := os.WriteFile(copied, content, 0o600); err != nil {
			return err
		}
	}
	for _, args := range [][]string{
		{"mod", "edit", "-replace", module + "=" + library, modFile},
		// -mod=mod, because the other version may require something else.
		{"build", "-trimpath", "-buildvcs=false", "-mod=mod", "-modfile", modFile, "-o", path, "./servers/chain"},
	} {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Stderr = os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("building with %s: %w", library, err)
		}
	}
	return nil
}
