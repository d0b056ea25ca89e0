//go:build unix

package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// directions are the upgrades from one library to another.
var directions = []struct{ from, to string }{{onTableflip, withCompat}, {withCompat, onTableflip}}

// TestSteps upgrades the program steps from one library to the other.
func TestSteps(t *testing.T) {
	binaries := map[string]string{}
	for _, version := range []string{onTableflip, withCompat, withDraining} {
		binaries[version] = buildProgram(t, "steps", version)
	}
	t.Run("faults", func(t *testing.T) { testFaults(t, binaries) })
	t.Run("parent killed", func(t *testing.T) { testParentKilled(t, binaries) })
	t.Run("child killed", func(t *testing.T) { testChildKilled(t, binaries) })
	t.Run("subprocess", func(t *testing.T) { testSubprocess(t, binaries) })
	t.Run("draining", func(t *testing.T) { testDraining(t, binaries) })
}

// testFaults lets the new process fail, hang and die at each step. The old one must serve
// as before, and the next upgrade must succeed.
func testFaults(t *testing.T, binaries map[string]string) {
	for _, d := range directions {
		for _, fault := range []string{
			"start exit", "start kill", "start hang",
			"new exit", "new kill", "new hang", "new stop",
			"listen exit", "listen kill", "listen hang", "listen stop",
		} {
			t.Run(d.from+" to "+d.to+", "+fault, func(t *testing.T) {
				if d.to == onTableflip && strings.HasSuffix(fault, " stop") && strings.HasPrefix(fault, "listen") {
					t.Skip("its Stop removes the socket's file of its parent")
				}
				timeout := 30 * time.Second
				if strings.HasSuffix(fault, "hang") {
					timeout = 3 * time.Second
				}
				s := startSteps(t, binaries[d.from], timeout)
				old := s.await(0, "alone, has parent: false")
				s.install(binaries[d.to])
				s.write("fault", fault)
				s.signal(old, syscall.SIGHUP)
				if text := s.awaitText(old, "upgrade: "); text == "<nil>" {
					t.Fatal("the upgrade succeeded")
				} else {
					t.Log(text)
				}
				s.observe(old)

				s.write("fault", "")
				s.observe(s.upgrade(old))
			})
		}
	}
}

// testParentKilled has the old process die while the new one starts.
func testParentKilled(t *testing.T, binaries map[string]string) {
	for _, step := range []string{"start", "new", "listen"} {
		t.Run(step, func(t *testing.T) {
			s := startSteps(t, binaries[onTableflip], 30*time.Second)
			old := s.await(0, "alone, has parent: false")
			s.install(binaries[withCompat])
			s.write("fault", step+" wait")
			s.signal(old, syscall.SIGHUP)
			child := s.await(0, "at "+step)
			s.signal(old, syscall.SIGKILL)
			s.awaitDeath()
			s.write("go", "")
			if step == "start" {
				// It was not yet told what it has.
				s.awaitText(child, "error: ")
				return
			}
			s.await(child, "alone, has parent: true")
			s.observe(child)
			s.write("fault", "")
			s.observe(s.upgrade(child))
		})
	}
}

// testChildKilled has the new process die when it is in charge. That is a crash, of which
// the old process learns nothing that it could make good.
func testChildKilled(t *testing.T, binaries map[string]string) {
	for _, d := range directions {
		t.Run(d.from+" to "+d.to, func(t *testing.T) {
			s := startSteps(t, binaries[d.from], 30*time.Second)
			old := s.await(0, "alone, has parent: false")
			s.install(binaries[d.to])
			s.write("fault", "ready kill")
			s.signal(old, syscall.SIGHUP)
			for line := range s.lines { // until no process is left
				pid, text, _ := strings.Cut(line, " ")
				if pid == strconv.Itoa(old) && strings.HasPrefix(text, "upgrade: ") && text != "upgrade: <nil>" {
					s.observe(old) // which has seen the death in time
					return
				}
			}
		})
	}
}

// testSubprocess has a service that uses tableflip, and was started by an upgrade, start
// one that uses ours. It has the variable and, before Ready, both pipes, and is no child
// of an upgrade.
func testSubprocess(t *testing.T, binaries map[string]string) {
	for _, step := range []string{"new", "serving"} {
		t.Run(step, func(t *testing.T) {
			s := startSteps(t, binaries[onTableflip], 30*time.Second)
			first := s.await(0, "alone, has parent: false")
			s.write("subprocess", binaries[withCompat])
			if err := os.Mkdir(filepath.Join(s.directory, "sub"), 0o700); err != nil {
				t.Fatal(err)
			}
			s.write("fault", step+" subprocess\nlisten wait\nexit wait\n")
			s.signal(first, syscall.SIGHUP)
			second, sub := 0, 0
			for second == 0 || sub == 0 { // either may come first
				switch pid, text := s.next(); text {
				case "at listen":
					second = pid
					if step == "serving" {
						s.write("go", "")
					}
				case "alone, has parent: false":
					sub = pid
				}
			}
			if sub == second {
				t.Error("it is not the subprocess")
			}
			s.signal(sub, syscall.SIGTERM)
			s.write("fault", "")
			s.write("go", "")
			s.observe(s.upgrade(second))
		})
	}
}

// testDraining has several processes drain (Options.MaxDraining). One with tableflip counts
// among them, and does not hear that it should hurry. In charge, it waits for its parent alone.
func testDraining(t *testing.T, binaries map[string]string) {
	s := startSteps(t, binaries[onTableflip], 2*time.Second)
	first := s.await(0, "alone, has parent: false")
	s.write("fault", "exit wait")
	s.install(binaries[withDraining])
	second := s.replace(first)
	third := s.replace(second)
	s.signal(third, syscall.SIGHUP)
	if text, want := s.awaitText(third, "upgrade: "), fmt.Sprintf("parent hasn't exited: the processes [%d %d] still drain", first, second); !strings.Contains(text, want) {
		t.Fatalf("with two processes that drain, of which one may, the upgrade returned %q, want %q", text, want)
	}
	s.observe(third)

	s.signal(first, syscall.SIGKILL)
	s.awaitDeath()
	s.install(binaries[onTableflip])
	back := s.replace(third)
	s.signal(back, syscall.SIGHUP)
	if text, want := s.awaitText(back, "upgrade: "), "parent hasn't exited"; text != want {
		t.Fatalf("while its parent drains, tableflip's upgrade returned %q, want %q", text, want)
	}
	s.observe(back)
	s.write("go", "")
	s.await(back, "alone, has parent: true")
	s.install(binaries[withCompat])
	s.observe(s.upgrade(back))
}

// A stepsService is the program steps, all generations of it.
type stepsService struct {
	t         *testing.T
	directory string
	binary    string
	lines     chan string
	first     *exec.Cmd
	dead      chan struct{} // closed when the first process has been reaped
	pids      map[int]bool
}

func startSteps(t *testing.T, binary string, timeout time.Duration) *stepsService {
	t.Helper()
	directory, err := os.MkdirTemp("", "steps")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(directory) })
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s := &stepsService{
		t: t, directory: directory, binary: filepath.Join(directory, "binary"),
		lines: make(chan string, 1000), dead: make(chan struct{}), pids: map[int]bool{},
	}
	s.install(binary)
	s.first = exec.Command(s.binary, directory)
	s.first.Stdout, s.first.Stderr = write, os.Stderr
	s.first.Env = append(os.Environ(), "STEPS_TIMEOUT="+timeout.String())
	if err := s.first.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	go func() {
		defer close(s.dead)
		_ = s.first.Wait()
	}()
	go func() {
		defer close(s.lines)
		defer read.Close()
		for lines := bufio.NewScanner(read); lines.Scan(); {
			s.lines <- lines.Text()
		}
	}()
	t.Cleanup(func() {
		for pid := range s.pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		s.first.Process.Kill()
		for range s.lines { // until no process is left
		}
	})
	return s
}

func (s *stepsService) install(binary string) { install(s.t, binary, s.binary) }

func (s *stepsService) write(name, content string) {
	s.t.Helper()
	path := filepath.Join(s.directory, name)
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stepsService) signal(pid int, sig syscall.Signal) {
	s.t.Helper()
	if err := syscall.Kill(pid, sig); err != nil {
		s.t.Fatal(err)
	}
}

// next returns the next line.
func (s *stepsService) next() (pid int, text string) {
	s.t.Helper()
	select {
	case line, ok := <-s.lines:
		if !ok {
			s.t.Fatal("the service has ended")
		}
		number, text, _ := strings.Cut(line, " ")
		pid, err := strconv.Atoi(number)
		if err != nil {
			s.t.Fatalf("the service told %q", line)
		}
		s.pids[pid] = true
		return pid, text
	case <-time.After(patience):
		s.t.Fatal("the service is silent")
		return 0, ""
	}
}

// await returns the process, which is any if pid is 0, that tells a text.
func (s *stepsService) await(pid int, want string) int {
	s.t.Helper()
	for {
		got, text := s.next()
		if text == want && (pid == 0 || got == pid) {
			return got
		}
	}
}

// awaitText returns what a process tells behind a word.
func (s *stepsService) awaitText(pid int, word string) string {
	s.t.Helper()
	for {
		got, text := s.next()
		if rest, ok := strings.CutPrefix(text, word); ok && got == pid {
			return rest
		}
	}
}

// upgrade returns the process that is in charge afterwards, and alone.
func (s *stepsService) upgrade(old int) int {
	s.t.Helper()
	s.signal(old, syscall.SIGHUP)
	for {
		pid, text := s.next()
		switch {
		case pid != old && strings.HasPrefix(text, "alone"):
			return pid
		case pid == old && strings.HasSuffix(text, "not ready yet"), pid == old && strings.HasSuffix(text, "parent hasn't exited"):
			s.signal(old, syscall.SIGHUP)
		case strings.HasPrefix(text, "error") || pid == old && strings.HasPrefix(text, "upgrade: ") && text != "upgrade: <nil>":
			s.t.Fatalf("%d told %s", pid, text)
		}
	}
}

// replace upgrades while a process drains, and returns the process that is in charge.
func (s *stepsService) replace(old int) int {
	s.t.Helper()
	s.signal(old, syscall.SIGHUP)
	current, isDraining := 0, false
	for current == 0 || !isDraining {
		pid, text := s.next()
		switch {
		case pid != old && text == "serving":
			current = pid
		case pid == old && text == "draining":
			isDraining = true
		case strings.HasPrefix(text, "error") || strings.HasPrefix(text, "upgrade: ") && text != "upgrade: <nil>":
			s.t.Fatalf("%d told %s", pid, text)
		}
	}
	s.observe(current)
	return current
}

func (s *stepsService) awaitDeath() {
	s.t.Helper()
	select {
	case <-s.dead:
	case <-time.After(patience):
		s.t.Fatal("the first process has not ended")
	}
}

// inCharge returns the process that the PID file names.
func (s *stepsService) inCharge() int {
	s.t.Helper()
	content, err := os.ReadFile(filepath.Join(s.directory, "pid"))
	if err != nil {
		s.t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(content))
	if err != nil {
		s.t.Fatal(err)
	}
	return pid
}

// observe checks that a process is in charge.
func (s *stepsService) observe(pid int) {
	s.t.Helper()
	conn, err := net.DialTimeout("unix", filepath.Join(s.directory, "listener"), patience)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	if answer, err := io.ReadAll(conn); string(answer) != fmt.Sprintln(pid) {
		s.t.Errorf("the answer is %q, %v, want %d", answer, err, pid)
	}
	if got := s.inCharge(); got != pid {
		s.t.Errorf("the PID file names %d, want %d", got, pid)
	}
	if entries, _ := os.ReadDir(s.directory); len(entries) > 0 {
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".tmp") {
				s.t.Errorf("%s is left", e.Name())
			}
		}
	}
}
