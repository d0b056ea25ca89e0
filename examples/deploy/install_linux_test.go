package deploy_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// A version that can take over is installed, and then one that cannot.
func TestInstall(t *testing.T) {
	dir := t.TempDir()
	binary, pidFile := filepath.Join(dir, "service"), filepath.Join(dir, "pid")
	good, bad := filepath.Join(dir, "good"), filepath.Join(dir, "bad")
	for _, path := range []string{binary, good} {
		if output, err := exec.Command("go", "build", "-o", path, "./web").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, output)
		}
	}
	if err := os.WriteFile(bad, []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	pid := func() int {
		content, _ := os.ReadFile(pidFile)
		pid, _ := strconv.Atoi(string(content))
		return pid
	}
	install := func(version, timeout string) (output string, err error) {
		cmd := exec.Command("./install.sh", version, binary, pidFile)
		cmd.Env = append(os.Environ(), "TIMEOUT="+timeout)
		text, err := cmd.CombinedOutput()
		return string(text), err
	}

	first := exec.Command(binary, "-listen", filepath.Join(dir, "socket"), "-pid-file", pidFile)
	first.Stderr = os.Stderr // a file, because Wait would wait for the end of a pipe
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { first.Process.Kill() })
	until(t, "the service is ready", func() bool { return pid() == first.Process.Pid })
	if output, err := install(good, "60"); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	second := pid()
	if second == 0 || second == first.Process.Pid {
		t.Fatalf("process %d is in charge after %d", second, first.Process.Pid)
	}
	t.Cleanup(func() { syscall.Kill(second, syscall.SIGTERM) })
	if err := first.Wait(); err != nil {
		t.Error("the old process:", err)
	}

	output, err := install(bad, "1")
	if err == nil || !strings.Contains(output, strconv.Itoa(second)) {
		t.Errorf("error %v, output %q, want one that names process %d", err, output, second)
	}
	if got := pid(); got != second {
		t.Errorf("process %d is in charge, want %d", got, second)
	}
}
