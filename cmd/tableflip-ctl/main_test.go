//go:build unix

package main

import (
	"path/filepath"
	"strings"
	"testing"

	"example.com/tableflip/internal/proctest"
)

func TestMain(m *testing.M) { proctest.Main(m) }

func init() { proctest.Role("command", main) }

func TestCommand(t *testing.T) {
	for _, test := range []struct {
		arguments []string
		status    int
		output    string // a part of it
	}{
		{[]string{"-h"}, 0, "usage"},
		{[]string{"-nonsense"}, 1, "usage"},
		{[]string{"-s", filepath.Join(t.TempDir(), "socket"), "status"}, 2, "socket"}, // nobody is there
	} {
		status, stdout, stderr := proctest.Run(t, "command", test.arguments...)
		if output := stdout + stderr; status != test.status || !strings.Contains(output, test.output) {
			t.Errorf("%q: exit status %d, want %d\n%s", test.arguments, status, test.status, output)
		}
	}
}
