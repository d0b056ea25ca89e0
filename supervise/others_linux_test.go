package supervise_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// These run the supervisor under those of others.

const manyUpgrades = 10

func TestUnderRunit(t *testing.T) {
	t.Parallel()
	runsv, err := exec.LookPath("runsv")
	if err != nil {
		t.Skip("needs runsv, of Debian's package runit")
	}
	b := newBed(t)
	dir := filepath.Join(b.dir, "service")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\nexec " + b.supervisedServer() + "\n"
	if err := os.WriteFile(filepath.Join(dir, "run"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	sv := func(command string) string {
		t.Helper()
		output, err := exec.Command("sv", command, dir).CombinedOutput()
		if err != nil {
			t.Fatalf("sv %s: %v: %s", command, err, output)
		}
		return string(output)
	}
	b.start(exec.Command(runsv, dir))
	b.upgradeUnderLoad(manyUpgrades, func() { sv("hup") })
	if starts := b.log.count("msg=started"); starts != 1 {
		t.Errorf("started %d times", starts)
	}
	sv("exit")
	b.ends(0)
	b.log.await("msg=ended", "status=0")
}

func TestUnderSupervisord(t *testing.T) {
	t.Parallel()
	supervisord, err := exec.LookPath("supervisord")
	if err != nil {
		t.Skip("needs supervisord, of Debian's package supervisor")
	}
	b := newBed(t)
	configuration := filepath.Join(b.dir, "supervisord.conf")
	if err := os.WriteFile(configuration, []byte(strings.Join([]string{
		"[supervisord]",
		"nodaemon=true",
		"logfile=/dev/null",
		"logfile_maxbytes=0",
		"pidfile=" + filepath.Join(b.dir, "supervisord.pid"),
		"[program:service]",
		"command=" + b.supervisedServer(),
		"stdout_logfile=/dev/stdout",
		"stdout_logfile_maxbytes=0",
		"redirect_stderr=true",
	}, "\n")), 0o644); err != nil {
		t.Fatal(err)
	}
	b.start(exec.Command(supervisord, "-c", configuration))
	b.upgradeUnderLoad(manyUpgrades, func() {
		children := childrenOf(b.pid)
		if len(children) != 1 {
			t.Fatalf("supervisord has the children %v", children)
		}
		syscall.Kill(children[0], syscall.SIGHUP)
	})
	if starts := b.log.count("spawned: 'service'"); starts != 1 {
		t.Errorf("started %d times", starts)
	}
	b.signal(syscall.SIGTERM)
	b.log.await("stopped: service (exit status 0)")
	b.ends(0)
}

// supervisedServer is a command line.
func (b *bed) supervisedServer() string {
	return strings.Join(append([]string{os.Args[0]}, superviseArguments(nil, []string{"serve", b.dir})...), " ")
}

func (j *journal) count(part string) (n int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, line := range j.lines {
		if strings.Contains(line, part) {
			n++
		}
	}
	return n
}
