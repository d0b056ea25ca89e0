//go:build unix

package doctest_test

import (
	"context"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip/internal/proctest"
)

// TestREADMEProgram runs the README's program, at another address, and upgrades it as
// the README says. The tests under systemd have a larger one.
func TestREADMEProgram(t *testing.T) {
	for _, test := range []struct{ name, start, upgrade, stop string }{
		{"Shell", `./web & wait`, `kill -HUP "$(cat web.pid)"`, `kill -TERM "$(cat web.pid)"`},
		{"Supervise", `exec ./supervise -quiet -- ./web`, `kill -HUP "$1"`, `kill -TERM "$1"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := proctest.SocketDir(t)
			socket := filepath.Join(dir, "socket")
			source := strings.Replace(readmeProgram(t), "localhost:8080", socket, 1)
			proctest.OK(t, os.WriteFile(filepath.Join(dir, "main.go"), []byte(source), 0o600))
			goBuild(t, filepath.Join(dir, "web"), filepath.Join(dir, "main.go"))
			goBuild(t, filepath.Join(dir, "supervise"), "./cmd/tableflip-supervise")
			shell := func(script string, args ...string) *exec.Cmd {
				cmd := exec.Command("sh", append([]string{"-c", script, "sh"}, args...)...)
				cmd.Dir = dir
				return cmd
			}

			started := shell(test.start)
			proctest.OK(t, started.Start())
			ended := proctest.InBackground(started.Wait)
			self := strconv.Itoa(started.Process.Pid)
			var generations proctest.PIDs
			t.Cleanup(generations.Kill)
			pid := func() int {
				content, _ := os.ReadFile(filepath.Join(dir, "web.pid"))
				pid, _ := strconv.Atoi(string(content))
				return pid
			}
			current := 0
			for range 3 {
				before := current
				proctest.AwaitThat(t, "another process is in charge", func() bool { current = pid(); return current != before && current != 0 })
				generations.Add(current)
				wantFile(t, socket)
				if before != 0 {
					proctest.AwaitThat(t, "the old process has ended", func() bool { return syscall.Kill(before, 0) != nil || proctest.IsZombie(before) })
				}
				proctest.OK(t, shell(`cp web web.new && mv web.new web`).Run())
				if out, err := shell(test.upgrade, self).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			proctest.AwaitThat(t, "another process is in charge", func() bool { return pid() != current })
			generations.Add(pid())
			wantFile(t, socket)
			proctest.OK(t, shell(test.stop, self).Run())
			proctest.AwaitThat(t, "the service has ended", func() bool { return pid() == 0 && !proctest.Exists(socket) })
			proctest.OK(t, proctest.Within(t, "the end of what was started", ended))
		})
	}
}

// readmeProgram returns the first program that the README shows.
func readmeProgram(t *testing.T) string {
	t.Helper()
	for _, b := range readPages(t)["README.md"].blocks {
		if strings.HasPrefix(b.text, "package main\n") {
			return b.text
		}
	}
	t.Fatal("the README shows no program")
	return ""
}

// goBuild builds a program with this repository's packages.
func goBuild(t *testing.T, binary, program string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-o", binary, program)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
}

// wantFile gets a file from the program, which serves its directory.
func wantFile(t *testing.T, socket string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	response, err := client.Get("http://web/web.pid")
	proctest.OK(t, err)
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Errorf("status %s", response.Status)
	}
}
