//go:build linux

package main

import (
	"bytes"
	"strings"
	"testing"
)

// TestPieces shows that the pieces are the whole: each begins where the one before it ends.
func TestPieces(t *testing.T) {
	for name, all := range map[string][]piece{"this library": pieces, "the floor": floorPieces} {
		at := wholes[0].from
		for _, p := range all {
			if p.from == "" {
				continue
			}
			if p.from != at {
				t.Errorf("%s: %q begins at %q, and the piece before it ends at %q", name, p.what, p.from, at)
			}
			at = p.to
		}
		if at != wholes[0].to {
			t.Errorf("%s: the last piece ends at %q, want %q", name, at, wholes[0].to)
		}
	}
}

func TestRun(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), 3, 1, &out); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if want := 2 + len(pieces) + len(wholes); len(lines) != want {
		t.Errorf("got %d lines, want %d:\n%s", len(lines), want, out.String())
	}
}
