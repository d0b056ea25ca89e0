//go:build linux

package main

import (
	"bytes"
	"strings"
	"testing"
)

// TestPieces shows that the pieces are the whole: each begins where the one before it ends.
func TestPieces(t *testing.T) {
	for name, of := range map[string]func(piece) span{
		"this library": func(p piece) span { return p.ours },
		"the floor":    func(p piece) span { return p.floor },
	} {
		at := of(wholes[0]).from
		for _, p := range pieces {
			s := of(p)
			if s == (span{}) {
				continue
			}
			if s.from != at {
				t.Errorf("%s: %q begins at %q, and the piece before it ends at %q", name, p.what, s.from, at)
			}
			at = s.to
		}
		if at != of(wholes[0]).to {
			t.Errorf("%s: the last piece ends at %q, want %q", name, at, of(wholes[0]).to)
		}
	}
}

func TestRun(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), 3, "1,10", &out); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if want := 2 + len(pieces) + len(wholes); len(lines) != want {
		t.Errorf("got %d lines, want %d:\n%s", len(lines), want, out.String())
	}
	for _, line := range lines {
		if got, want := strings.Count(line, "|"), 1+1+2*2; got != want {
			t.Errorf("got %d columns, want %d: %s", got-1, want-1, line)
		}
	}
}
