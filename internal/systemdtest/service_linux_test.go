package systemdtest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
)

// This file owns what a test does to a service, and what systemd says of it.

const (
	// installed is where the units have their binary.
	installed = "/usr/local/bin/web"

	// placeholder is the version in the binary as it is built.
	placeholder = "version-000000-good"
)

// A kind is a way to have systemd follow a service.
type kind struct {
	service string
	socket  string // the unit, if it is activated

	notifies     bool // so that MainPID changes with the commit
	keepsSockets bool // systemd has them, too
	supervised   bool // the main process is tableflip-supervise
}

var (
	notify     = kind{service: "notify.service", notifies: true}
	pidFile    = kind{service: "pidfile.service"}
	activated  = kind{service: "activated.service", socket: "activated.socket", notifies: true, keepsSockets: true}
	stored     = kind{service: "store.service", notifies: true, keepsSockets: true}
	supervised = kind{service: "supervised.service", notifies: true, supervised: true}
)

func (k kind) units() []string {
	if k.socket != "" {
		return []string{k.socket, k.service}
	}
	return []string{k.service}
}

type service struct {
	kind
	t        *testing.T
	load     *load
	number   int             // of the version that was installed last
	version  string          // of the process in charge
	main     int             // PID of the process in charge
	inCharge map[string]bool // all versions with their PIDs, as in load.answers
	tried    map[string]bool // versions that were on trial
	trial    time.Duration   // Options.Trial
}

// newService returns a service that is not started. It is stopped at the end of
// the test.
func newService(t *testing.T, k kind) *service {
	s := &service{kind: k, t: t, inCharge: make(map[string]bool), tried: make(map[string]bool)}
	t.Cleanup(func() {
		s.t = t
		s.systemctl(append([]string{"stop"}, k.units()...)...)
	})
	return s
}

// change has a drop-in add these lines to the unit's section [Service].
func (s *service) change(lines ...string) {
	s.t.Helper()
	dir := filepath.Join(units, s.service+".d")
	proctest.OK(s.t, os.MkdirAll(dir, 0o755))
	content := "[Service]\n" + strings.Join(lines, "\n") + "\n"
	proctest.OK(s.t, os.WriteFile(filepath.Join(dir, "test.conf"), []byte(content), 0o644))
	s.systemctl("daemon-reload")
}

func (s *service) systemctl(args ...string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), proctest.Patience)
	defer cancel()
	output, err := exec.CommandContext(ctx, "systemctl", append([]string{"--user"}, args...)...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("systemctl %s: %v\n%s", strings.Join(args, " "), err, output)
	}
}

// show returns the properties of the service.
func (s *service) show() map[string]string {
	s.t.Helper()
	output, err := exec.Command("systemctl", "--user", "show", s.service).Output()
	if err != nil {
		s.t.Fatalf("systemctl show: %v", err)
	}
	properties := make(map[string]string)
	for line := range strings.Lines(string(output)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		properties[name] = value
	}
	return properties
}

// await waits until a property of the service satisfies done.
func (s *service) await(property string, done func(value string) bool) {
	s.t.Helper()
	var value string
	defer func() {
		if s.t.Failed() {
			s.t.Logf("%s is %q", property, value)
		}
	}()
	proctest.AwaitThat(s.t, s.service+": "+property, func() bool {
		value = s.show()[property]
		return done(value)
	})
}

func equal(want string) func(string) bool {
	return func(value string) bool { return value == want }
}

// expect compares properties with what they must be.
func (s *service) expect(want map[string]string) {
	s.t.Helper()
	got := s.show()
	for property, value := range want {
		if got[property] != value {
			s.t.Errorf("%s: %s is %q, want %q", s.service, property, got[property], value)
		}
	}
}

// expectRunning fails the test unless the process in charge is the main process,
// of its version, and comes to be alone but for others.
func (s *service) expectRunning(others ...int) {
	s.t.Helper()
	s.expect(map[string]string{
		"MainPID":     strconv.Itoa(s.main),
		"ActiveState": "active",
		"SubState":    "running",
		"Result":      "success",
	})
	running := slices.Sorted(slices.Values(append(others, s.main)))
	proctest.AwaitThat(s.t, fmt.Sprintf("just %v run", running), func() bool { return slices.Equal(processes(), running) })
	binary, err := os.ReadFile(fmt.Sprintf("/proc/%d/exe", s.main))
	if err != nil || !bytes.Contains(binary, []byte(s.version)) {
		s.t.Errorf("the main process does not run %s: %v", s.version, err)
	}
}

// processes returns the PIDs of the service's processes, of zombies, too.
func processes() []int { return commands(filepath.Base(installed)) }

// awaitNobody waits until no process of the service is left. The kernel takes a process out
// of its cgroup, of whose end systemd is told, before it can be reaped.
func (s *service) awaitNobody() {
	s.t.Helper()
	proctest.AwaitThat(s.t, "no process is left", func() bool { return len(processes()) == 0 })
}

// commands returns the PIDs of the processes of this command.
func commands(command string) []int {
	var pids []int
	names, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, name := range names {
		if content, _ := os.ReadFile(name); strings.TrimSpace(string(content)) == command {
			pid, _ := strconv.Atoi(strings.Split(name, "/")[2])
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// awaitEnd waits until a process has ended, with all of its descriptors, and been
// reaped.
func (s *service) awaitEnd(pid int) {
	s.t.Helper()
	proctest.AwaitThat(s.t, fmt.Sprintf("process %d has ended", pid), func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH })
}

// install replaces the binary by the next version of web, with this behaviour, and returns
// the version.
func (s *service) install(behaviour string) string {
	s.t.Helper()
	return s.installProgram("web", behaviour)
}

// installProgram renames, because a running binary can't be written to.
func (s *service) installProgram(program, behaviour string) string {
	s.t.Helper()
	binary, err := os.ReadFile(filepath.Join(binaries, program))
	proctest.OK(s.t, err)
	if !bytes.Contains(binary, []byte(placeholder)) {
		s.t.Fatal("the binary does not contain its version")
	}
	s.number++
	version := fmt.Sprintf("version-%06d-%s", s.number, behaviour)
	proctest.OK(s.t, os.WriteFile(installed+".new", bytes.ReplaceAll(binary, []byte(placeholder), []byte(version)), 0o755))
	proctest.OK(s.t, os.Rename(installed+".new", installed))
	return version
}

// warning is the priority of journal entries from which on they are warnings.
const warning = "4"

// tolerance is what may go wrong in a phase.
type tolerance struct {
	refused, cut bool   // requests
	warnings     string // those of systemd, a regular expression
}

// phase runs do under load, and fails the test for what went wrong meanwhile.
func (s *service) phase(name string, allowed tolerance, do func()) {
	s.t.Helper()
	outer := s.t
	defer func() { s.t = outer }()
	outer.Run(name, func(t *testing.T) {
		s.t = t
		cursor := journalCursor(t)
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("the journal:\n%s", journalText(t, cursor))
			}
		})
		if s.load != nil {
			s.load.crashes.Store(allowed.cut)
		}
		do()
		if s.load != nil {
			s.load.settle(t)
			s.load.crashes.Store(false)
			s.load.settle(t) // an exchange may have been given up since
			answers, refused, cut := s.load.take()
			for process := range answers {
				if version, _, _ := strings.Cut(process, " "); !s.inCharge[process] && !s.tried[version] {
					t.Errorf("%s has answered, which was never in charge", process)
				}
			}
			report(t, allowed.refused, "refused", refused)
			report(t, allowed.cut, "lost", cut)
		}
		journalctl(t, "--sync")
		for _, e := range journal(t, cursor) {
			if e.Unit == s.service && e.Priority <= warning &&
				(allowed.warnings == "" || !regexp.MustCompile(allowed.warnings).MatchString(e.Message)) {
				t.Errorf("systemd warns: %s", e.Message)
			}
		}
	})
	if outer.Failed() {
		outer.FailNow() // what follows builds on this
	}
}

func report(t *testing.T, allowed bool, what string, failures []error) {
	t.Helper()
	switch {
	case len(failures) == 0:
	case allowed:
		t.Logf("%d requests were %s, as may be", len(failures), what)
	default:
		t.Errorf("%d requests were %s, such as: %v", len(failures), what, failures[0])
	}
}

// entry is what this file needs of journald's.
type entry struct {
	Cursor   string `json:"__CURSOR"`
	Unit     string `json:"USER_UNIT"` // of systemd's messages about it
	Priority string
	PID      string `json:"_PID"`
	Message  string
}

func journalctl(t *testing.T, args ...string) []byte {
	t.Helper()
	output, err := exec.Command("journalctl", append([]string{"--no-pager", "--quiet"}, args...)...).Output()
	if err != nil {
		t.Fatalf("journalctl: %v", err)
	}
	return output
}

// journalCursor returns the place after all that was logged so far. So that this is there, it
// has journald read it first.
func journalCursor(t *testing.T) string {
	t.Helper()
	journalctl(t, "--sync")
	var last entry
	proctest.OK(t, json.Unmarshal(journalctl(t, "-o", "json", "-n", "1"), &last))
	return last.Cursor
}

func journal(t *testing.T, cursor string) []entry {
	t.Helper()
	var entries []entry
	for line := range bytes.Lines(journalctl(t, "-o", "json", "--after-cursor", cursor)) {
		var e entry
		proctest.OK(t, json.Unmarshal(line, &e))
		entries = append(entries, e)
	}
	return entries
}

func journalText(t *testing.T, cursor string) []byte {
	t.Helper()
	return journalctl(t, "-o", "short-precise", "--after-cursor", cursor)
}
