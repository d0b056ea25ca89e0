//go:build linux

package main

import (
	"math"
	"os/exec"
	"path/filepath"
	"testing"

	hand "example.com/tableflip/benchmarks/handover"
)

// What a further listener costs is known: in the new process, seven calls, of which package
// net makes six, and nothing in the old one. In the floor, it costs os.NewFile two more.
func TestUpgrade(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("needs strace: ", err)
	}
	dir := t.TempDir()
	binary := filepath.Join(dir, "chain")
	if out, err := exec.Command("go", "build", "-o", binary, "../servers/chain").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	const few, many = 10, 210
	for c, want := range map[hand.Contender]float64{hand.Ours: 7, hand.Floor: 9} {
		oldFew, newFew, err := upgrade(binary, c, few, filepath.Join(dir, "few"))
		if err != nil {
			t.Fatal(err)
		}
		oldMany, newMany, err := upgrade(binary, c, many, filepath.Join(dir, "many"))
		if err != nil {
			t.Fatal(err)
		}
		if got := float64(newMany-newFew) / (many - few); math.Abs(got-want) > 0.3 {
			t.Errorf("%s: a listener costs the new process %.2f system calls, want %v", c, got, want)
		}
		if got := float64(oldMany-oldFew) / (many - few); got > 0.3 {
			t.Errorf("%s: a listener costs the old process %.2f system calls, want none", c, got)
		}
	}
}
