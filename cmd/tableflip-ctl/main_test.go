//go:build unix

package main

import (
	"errors"
	"os"
	"os/exec"
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
		cmd := exec.Command(os.Args[0], test.arguments...)
		cmd.Env = append(os.Environ(), proctest.Environment("command"))
		output, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if got := cmd.ProcessState.ExitCode(); got != test.status || !strings.Contains(string(output), test.output) {
			t.Errorf("%q: exit status %d, want %d\n%s", test.arguments, got, test.status, output)
		}
	}
}
