//go:build linux

package main

import (
	"os"
	"slices"
	"testing"

	"example.com/tableflip/internal/machine"
)

func TestMain(m *testing.M) {
	if os.Getenv(taskVariable) != "" { // the binary is also init on a machine
		main()
		return
	}
	os.Exit(m.Run())
}

// Each row crashes, and those that somebody starts again, or that still serve, are back.
func TestRows(t *testing.T) {
	built := t.TempDir()
	t.Chdir("..")
	if err := build(built); err != nil {
		t.Fatal(err)
	}
	for i, r := range rows {
		t.Run(r.under+"/"+r.title, func(t *testing.T) {
			if whyNot := machine.Missing(""); r.under == systemd && whyNot != "" {
				t.Skip(whyNot)
			}
			if testing.Short() && r.program != "ours" {
				t.Skip("the peers take their time")
			}
			t.Parallel()
			crashes, err := measure(task{Row: i, Number: 2, Built: built})
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range crashes {
				if comesBack := r.under == systemd || slices.Equal(r.args, onTrial); (c.Gap != never) != comesBack {
					t.Errorf("the next good answer came after %v", gapText(c.Gap))
				}
				if c.Sent <= c.Failed {
					t.Errorf("%d of %d requests failed", c.Failed, c.Sent)
				}
			}
			if len(crashes) != 2 {
				t.Errorf("got %d crashes", len(crashes))
			}
		})
	}
}
