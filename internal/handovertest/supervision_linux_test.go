package handovertest

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// These upgrades would succeed, and be useless.

func init() {
	// told upgrades when it is ordered to, and reports what the Logger received.
	proctest.Role("told", func() {
		w := proctest.OpenWire()
		logger, logs := proctest.NewLogger()
		upg := proctest.Must(tableflip.New(tableflip.Options{Logger: logger}))
		MustBeReady(upg)
		proctest.Must(0, upg.WaitForParent(context.Background()))
		w.Report("alone")
		for {
			select {
			case <-upg.Exit():
				return
			case <-w.Orders():
				err := upg.Upgrade()
				var lines []string
				for len(logs) > 0 {
					lines = append(lines, <-logs)
				}
				w.Report("logged", strings.Join(lines, ""))
				w.ReportError("upgraded", err)
			}
		}
	})
}

func mustBeRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can make namespaces")
	}
}

// The kernel would end the new process with the old one.
func TestSupervisionPID1(t *testing.T) {
	mustBeRoot(t)
	t.Parallel()
	s := proctest.NewService(t)
	cmd := s.Command("told", s.Wire())
	proctest.Shell(`exec unshare --pid --fork --kill-child "$0"`)(cmd)
	s.Start(cmd)
	p := s.Next()
	p.Await("alone")
	for range 2 {
		p.Order("upgrade")
		if m := p.Await("upgraded"); !strings.Contains(m.Text, "tableflip-supervise") {
			t.Errorf("Upgrade returned %q", m.Text)
		}
	}
}

// A file that is mounted by itself shows the old binary after the new one has taken its
// name.
func TestSupervisionStaleMount(t *testing.T) {
	mustBeRoot(t)
	t.Parallel()
	dir := t.TempDir()
	source, mounted := filepath.Join(dir, "source"), filepath.Join(dir, "a mount") // a name that the kernel escapes
	copyBinary(t, source)
	proctest.OK(t, os.WriteFile(mounted, nil, 0o755))
	s := proctest.NewService(t)
	cmd := s.Command("told", s.Wire(), "SOURCE="+source, "MOUNTED="+mounted)
	proctest.Shell(`exec unshare --mount sh -c 'mount --bind "$SOURCE" "$MOUNTED" && exec "$MOUNTED"'`)(cmd)
	s.Start(cmd)
	p := s.Next()
	p.Await("alone")

	upgrade := func() (logged string) {
		p.Order("upgrade")
		logged = p.Await("logged").Text
		if m := p.Await("upgraded"); m.Text != "" {
			t.Fatal(m.Text)
		}
		p = s.Next()
		p.Await("alone")
		return logged
	}
	const warning = "the binary is mounted by itself"
	if logged := upgrade(); strings.Contains(logged, warning) {
		t.Errorf("it is the file that was mounted, and the log says %s", logged)
	}
	copyBinary(t, source+".new")
	proctest.OK(t, os.Rename(source+".new", source))
	if logged := upgrade(); !strings.Contains(logged, warning) || !strings.Contains(logged, mounted) {
		t.Errorf("the log says %q, want %q", logged, warning)
	}
}

// An init of containers ends with the process that it has started.
func TestSupervisionContainerInit(t *testing.T) {
	mustBeRoot(t)
	t.Parallel()
	for _, name := range []string{"tini", "sh"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := proctest.NewService(t)
			cmd := s.Command("told", s.Wire())
			initProgram := filepath.Join(t.TempDir(), name)
			content, err := os.ReadFile("/bin/sh")
			proctest.OK(t, err)
			proctest.OK(t, os.WriteFile(initProgram, content, 0o755))
			proctest.Shell(`exec unshare --pid --fork --mount-proc --kill-child "` + initProgram + `" -c '"$0"; exit' "$0"`)(cmd)
			s.Start(cmd)
			p := s.Next()
			p.Await("alone")
			p.Order("upgrade")
			warned := strings.Contains(p.Await("logged").Text, "PID 1 ends the container")
			if warned != (name == "tini") {
				t.Errorf("with PID 1 called %s, warned: %v", name, warned)
			}
		})
	}
}
