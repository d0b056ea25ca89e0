//go:build linux

package main

import (
	"bytes"
	"strings"
	"testing"
)

// Two builds of the same library, and the rest, are measured, and each in every measure.
func TestCompare(t *testing.T) {
	t.Chdir("..")
	var out, all bytes.Buffer
	cfg := config{this: "..", other: "..", pairs: 2, listeners: []int{1, 3}, chain: 2, benchstat: &all}
	if err := run(t.Context(), cfg, &out); err != nil {
		t.Fatal(err)
	}
	want := len(cfg.listeners) * len(measures)
	for i, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
		if columns := strings.Count(line, "|") - 1; columns != 6 || i > want+1 {
			t.Errorf("line %d has %d columns:\n%s", i, columns, &out)
		}
	}
	for _, by := range []string{"this", "other", "tableflip", "bare-exec"} {
		if n := strings.Count(all.String(), "/by="+by+" 1 "); n != cfg.pairs*want {
			t.Errorf("%d samples are about %q, want %d:\n%s", n, by, cfg.pairs*want, &all)
		}
	}
}

// A directory that does not hold the library is an error, and not compared to itself.
func TestCompareWithNothing(t *testing.T) {
	t.Chdir("..")
	if err := run(t.Context(), config{this: "..", other: t.TempDir(), pairs: 1, listeners: []int{1}}, t.Output()); err == nil {
		t.Error("want an error")
	}
}
