package systemdtest

import (
	"context"
	"os/exec"
	"regexp"
	"strconv"
	"testing"

	"example.com/tableflip/internal/proctest"
)

// This file owns reloads by the control socket, of which systemctl reload knows how they
// went.

var controlled = kind{service: "control.service", notifies: true}

func TestControl(t *testing.T) {
	onMachine(t, func(t *testing.T) {
		s := newService(t, controlled)
		s.phase("Start", tolerance{}, s.start)
		s.load = startLoad(t)
		s.phase("Reload", tolerance{}, func() {
			for range reloads {
				s.reloadByControl()
			}
		})
		s.reloadsFail()
		s.load.end()
		s.load = nil
		s.phase("Refused", tolerance{warnings: reloadFailed}, func() {
			response, old := s.hold("drain"), s.main
			defer response.Body.Close()
			draining := s.hold("forever")
			s.version = s.install("good")
			s.systemctl("reload", s.service)
			s.adopt()
			s.wantReloadFails("the process before this one drains")
			draining.Body.Close()
			s.awaitEnd(old)
			s.reloadByControl()
		})
		s.phase("Stop", tolerance{}, s.stop)
	})
}

// reloadFailed matches what systemd says if ExecReload= fails.
const reloadFailed = "Control process exited|Reload failed"

// failures are versions that cannot take over, and what whoever has asked is told.
var failures = []struct{ behaviour, says string }{
	{"fail", "exited before it was ready: exit status"},
	{"hang", "was not ready after 10s"},
	{"bind", "failed: .*address already in use"},
	{"cert", "failed: service: .*certificate"},
}

func (s *service) reloadsFail() {
	s.phase("ReloadFails", tolerance{warnings: reloadFailed}, func() {
		for _, version := range failures {
			s.install(version.behaviour)
			s.wantReloadFails(version.says)
			s.load.settle(s.t)
			s.expectRunning()
			s.reloadByControl()
		}
	})
}

// reloadByControl upgrades to a new version, which is in charge when systemctl returns.
func (s *service) reloadByControl() {
	s.t.Helper()
	s.version = s.install("good")
	old := s.main
	s.systemctl("reload", s.service)
	s.adopt()
	if s.main == old {
		s.t.Fatalf("the main process is %d as before", old)
	}
	s.awaitEnd(old) // which may accept for another moment
	s.awaitAnswers()
	s.expectRunning()
	s.expect(map[string]string{"NRestarts": "0", "StatusText": ""})
}

// ask asks the process in charge.
func (s *service) ask(what string) string {
	s.t.Helper()
	output, err := exec.CommandContext(s.t.Context(), installed, "-ctl", what).CombinedOutput()
	if err != nil {
		s.t.Fatalf("web -ctl %s: %v\n%s", what, err, output)
	}
	return string(output)
}

// wantReloadFails checks that systemctl reload fails, and that the journal says why.
func (s *service) wantReloadFails(says string) {
	s.t.Helper()
	cursor := journalCursor(s.t)
	ctx, cancel := context.WithTimeout(context.Background(), proctest.Patience)
	defer cancel()
	output, err := exec.CommandContext(ctx, "systemctl", "--user", "reload", s.service).CombinedOutput()
	if err == nil || ctx.Err() != nil {
		s.t.Fatalf("the reload: %v\n%s", err, output)
	}
	reason := regexp.MustCompile(says)
	proctest.AwaitThat(s.t, "the client says why", func() bool {
		for _, e := range journal(s.t, cursor) {
			if e.Unit != s.service && e.PID != strconv.Itoa(s.main) && reason.MatchString(e.Message) {
				return true
			}
		}
		return false
	})
}

// Under tableflip-supervise it is the same, except that systemd's main process is
// another.
func TestControlSupervised(t *testing.T) {
	onMachine(t, func(t *testing.T) {
		s := newService(t, supervised)
		s.change("ExecReload=", "ExecReload=/usr/local/bin/web -ctl upgrade")
		s.phase("Start", tolerance{}, s.start)
		s.load = startLoad(t)
		reload := func() {
			s.t.Helper()
			s.version = s.install("good")
			old := s.main
			s.systemctl("reload", s.service)
			s.askMain()
			s.awaitEnd(old)
		}
		s.phase("Reload", tolerance{}, func() {
			for range 5 {
				reload()
			}
		})
		s.phase("ReloadFails", tolerance{warnings: reloadFailed}, func() {
			for _, version := range failures {
				s.install(version.behaviour)
				s.wantReloadFails(version.says)
				reload()
			}
		})
		s.load.end()
		s.load = nil
	})
}
