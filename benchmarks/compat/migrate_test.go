//go:build unix

package main

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// TestMigrate upgrades the program from tableflip to ours and back, and again. Each
// generation must observe what it would without a change of the library.
func TestMigrate(t *testing.T) {
	binaries := map[string]string{onTableflip: build(t, onTableflip), onOurs: build(t, withCompat)}
	chain := []string{onTableflip, onOurs, onOurs, onTableflip, onTableflip, onOurs, onTableflip, onOurs, onOurs, onOurs}

	installed := filepath.Join(t.TempDir(), "compat")
	install(t, binaries[chain[0]], installed)
	s := start(t, installed)
	s.observe()
	s.keep()
	for _, version := range chain[1:] {
		install(t, binaries[version], installed)
		s.upgrade()
		s.observe()
		s.observeKept()
	}
	s.stop()
	if got := s.improved["the PID file after Stop"]; got != "gone" {
		t.Errorf("the PID file after Stop: %s", got)
	}

	alone := start(t, binaries[onTableflip])
	alone.observe()
	alone.keep()
	for range chain[1:] {
		alone.upgrade()
		alone.observe()
		alone.observeKept()
	}
	alone.stop()
	compare(t, alone.transcript, s.transcript)
}

// install puts a binary into place as a deployment does.
func install(t *testing.T, binary, path string) {
	t.Helper()
	content, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".new", content, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// withOption adds a line to the options of the program in directory.
func withOption(t *testing.T, directory, line string) {
	t.Helper()
	path := filepath.Join(directory, "main.go")
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	options := []byte("tableflip.New(tableflip.Options{\n")
	if n := bytes.Count(program, options); n != 1 {
		t.Fatalf("the program has %d literals of options", n)
	}
	program = bytes.Replace(program, options, append(options, "\t\t"+line+",\n"...), 1)
	if err := os.WriteFile(path, program, fs.FileMode(0o600)); err != nil {
		t.Fatal(err)
	}
}
