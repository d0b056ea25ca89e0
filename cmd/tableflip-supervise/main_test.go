//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package main

import (
	"strings"
	"testing"

	"example.com/tableflip/internal/proctest"
)

func TestMain(m *testing.M) { proctest.Main(m) }

func init() { proctest.Role("command", main) }

func TestCommand(t *testing.T) {
	for _, test := range []struct {
		arguments      string
		status         int
		stdout, stderr string // parts of it
	}{
		{"-h", 0, "", "-stop-timeout"},
		{"", 125, "", "usage"},
		{"-nonsense", 125, "", "Exit status"},
		{"-nonsense -- true", 125, "", "usage"},
		{"-parent-death NONSENSE -- true", 125, "", "-parent-death: "},
		{"-quiet -- nowhere-to-be-found", 127, "", "not found"},
		{"-quiet -- ./", 126, "", "directory"},
		{"-quiet -- echo once", 0, "once\n", ""},
		{"-- echo -quiet", 0, "-quiet\n", "msg=started"},
		{"-- sh -c exit${IFS}7", 7, "", "status=7"},
		{"-stop-timeout 1s -takeover-timeout 1s -pid-file / -quiet sh -c kill${IFS}-9${IFS}$$", 128 + 9, "", ""},
	} {
		status, stdout, stderr := proctest.Run(t, "command", strings.Fields(test.arguments)...)
		if status != test.status {
			t.Errorf("%q: exit status %d, want %d\n%s", test.arguments, status, test.status, stderr)
		}
		if stdout != test.stdout || !strings.Contains(stderr, test.stderr) {
			t.Errorf("%q: output %q, %q", test.arguments, stdout, stderr)
		}
		if strings.HasPrefix(test.arguments, "-quiet") && strings.Contains(stderr, "INFO") {
			t.Errorf("%q: not quiet: %s", test.arguments, stderr)
		}
	}
}
