package systemdtest

import (
	"os"
	"path/filepath"
	"testing"

	"example.com/tableflip/internal/proctest"
)

// This file owns a service that moves from cloudflare/tableflip to this library without a
// restart, and back.

// The program either, built on either library.
const (
	ours   = "ours"
	theirs = "theirs"
)

// As their README has it, and their issue 6.
func TestMigratePIDFile(t *testing.T) {
	onMachine(t, func(t *testing.T) {
		s := startTheirs(t, "good", "Type=simple", "PIDFile=/run/web.pid", "Restart=on-failure")
		s.migrate("good", "good")
	})
}

// With what a service says to systemd itself, until it leaves that to our library.
func TestMigrateNotify(t *testing.T) {
	leaveToLong(t)
	onMachine(t, func(t *testing.T) {
		s := startTheirs(t, "tell", "Type=notify", "Restart=on-failure")
		s.change("Type=notify", "Restart=on-failure", "NotifyAccess=all") // which the service has had no use for
		s.migrate("tell", "good")
	})
}

// startTheirs starts a service on their library, by a unit with these settings.
func startTheirs(t *testing.T, behaviour string, settings ...string) *service {
	s := newService(t, kind{service: "migrate.service"})
	unit := "[Service]\nExecStart=" + installed + " -pid-file /run/web.pid\nExecReload=/bin/kill -HUP $MAINPID\n"
	proctest.OK(t, os.WriteFile(filepath.Join(units, s.service), []byte(unit), 0o644))
	s.change(settings...)
	s.phase("Start", tolerance{}, func() {
		s.version = s.installProgram(theirs, behaviour)
		s.systemctl("start", s.service)
		s.awaitFirst()
	})
	return s
}

// migrate upgrades a service from their library to ours and back, under load. Its versions
// behave in one way, and in the end, with ours, in another.
func (s *service) migrate(behaviour, last string) {
	s.load = startLoad(s.t)
	// Their library drains in its own way, and its children are no children of systemd's
	// before it has ended.
	theirOwn := tolerance{cut: true, warnings: "is not our child"}
	move := func(name string, allowed tolerance, program, behaviour string) {
		s.phase(name, allowed, func() { s.reloadTo(s.installProgram(program, behaviour)) })
	}
	move("ToOurs", theirOwn, ours, behaviour)
	move("OursToOurs", tolerance{}, ours, behaviour)
	move("Back", tolerance{}, theirs, behaviour)
	move("TheirsToTheirs", theirOwn, theirs, behaviour)
	move("ToOursAgain", theirOwn, ours, last)
	s.phase("Kill", tolerance{refused: true, cut: true, warnings: exited}, s.kill)
	move("OursToOursAgain", tolerance{}, ours, last)
	move("BackAgain", tolerance{}, theirs, behaviour)
	s.load.end()
	s.load = nil
	s.phase("Stop", tolerance{}, func() {
		s.systemctl("stop", s.service)
		s.expect(map[string]string{"MainPID": "0", "ActiveState": "inactive", "Result": "success"})
	})
}
