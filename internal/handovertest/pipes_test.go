//go:build unix

package handovertest

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/proctest"
)

// A child must tell the pipes of its handover from others, on each kind of system.

// setPipes has this process, whose children identify pipes as Linux does, identify
// them as another system does.
func setPipes(t *testing.T, anonymous, unique bool) {
	proctest.Set(t, &descriptor.AnonymousPipes, anonymous)
	proctest.Set(t, &descriptor.UniquePipes, unique)
}

var pipeSystems = []struct {
	story             string
	anonymous, unique bool
}{
	{"zeros, as on OpenBSD", true, false},
	{"used again, as on macOS", false, false},
}

func TestPipesToken(t *testing.T) {
	for _, system := range pipeSystems {
		t.Run(system.story, func(t *testing.T) {
			setPipes(t, system.anonymous, system.unique)
			upg, _ := NewParent(t, tableflip.Options{}, "succeed")
			Upgrade(t, upg)
		})
	}
}

// Pipes whose devices and inodes are right are not the parent's if the token is not in
// them. Elsewhere, for lack of a token, a child would take what it finds there for its
// parent's.
func TestPipesOfOthers(t *testing.T) {
	for _, system := range pipeSystems {
		t.Run(system.story, func(t *testing.T) {
			setPipes(t, system.anonymous, system.unique)
			wantNoNew(t, `dd bs=26 count=1 <&4 >/dev/null 2>&1; exec "$0"`, "new-twice", 2, "did not arrive")
		})
	}
}

// Where nothing else tells pipes apart, a descriptor that is none is not taken for one.
func TestPipesReplaced(t *testing.T) {
	setPipes(t, true, false)
	wantNoNew(t, `exec "$0" 3>/dev/null`, "new-twice", 2, "did not arrive")
}

// The token can be read once, and New be called twice: the second time must not make
// a first generation of the child.
func TestPipesTokenTwice(t *testing.T) {
	setPipes(t, false, false)
	wantNoNew(t, `set -- "$0" $TABLEFLIP_HANDOVER
		for word; do case $word in token=*) token=$word;; esac; done
		for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do more="$more;fd,missing"; done
		TABLEFLIP_HANDOVER="$2 $3 $4 fds=21 parts=1 pid=1 until=2 $token" TABLEFLIP_HANDOVER_0="${more#;};fd,missing" exec "$0"`,
		"new-twice", 2, "inherit descriptor")
}

// wantNoNew has a script start a child of this role, which calls New so many times and
// is to get an error with this text.
func wantNoNew(t *testing.T, script, role string, times int, want string) {
	t.Helper()
	upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(script)}, role)
	proctest.OK(t, upg.Ready())
	var exit *exec.ExitError
	if err := upg.Upgrade(); !errors.As(err, &exit) {
		t.Errorf("Upgrade: %v", err)
	}
	for range times {
		if got := s.Await("new").Text; !strings.Contains(got, want) {
			t.Errorf("New: %s", got)
		}
	}
}
