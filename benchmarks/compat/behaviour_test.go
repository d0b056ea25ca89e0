//go:build unix

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The versions of the program: on tableflip, and on what replaces it.
const (
	onTableflip  = "tableflip"
	onOurs       = "ours"
	withCompat   = "ours, with Options.Compat"
	withDraining = "ours, with Options.Compat and Options.MaxDraining"
)

// TestBehaviour has each version of the program start, upgrade itself twice, and
// stop, and compares what it and its clients observe.
func TestBehaviour(t *testing.T) {
	transcripts := map[string][]string{}
	for _, version := range []string{onTableflip, onOurs} {
		t.Run(version, func(t *testing.T) {
			s := start(t, build(t, version))
			s.observe()
			s.keep()
			for range 2 {
				s.upgrade()
				s.observe()
				s.observeKept()
			}
			s.stop()
			transcripts[version] = s.transcript

			for what, want := range improvements {
				if got := s.improved[what]; got != want[version] {
					t.Errorf("%s: got %q, want %q", what, got, want[version])
				}
			}
		})
	}
	compare(t, transcripts[onTableflip], transcripts[onOurs])
}

func compare(t *testing.T, theirs, ours []string) {
	t.Helper()
	for i := range max(len(theirs), len(ours)) {
		if i >= len(theirs) || i >= len(ours) || theirs[i] != ours[i] {
			t.Fatalf("the two differ from observation %d on:\ntableflip: %q\nours:      %q", i, theirs[min(i, len(theirs)):], ours[min(i, len(ours)):])
		}
	}
	t.Logf("%d equal observations:\n%s", len(ours), strings.Join(ours, "\n"))
}

// improvements are the observations that differ, and are meant to.
var improvements = map[string]map[string]string{
	"the PID file's mode":     {onTableflip: "-rw-------", onOurs: "-rw-r--r--"},
	"the PID file after Stop": {onTableflip: "still there", onOurs: "gone"},
}

// build builds the program.
func build(t *testing.T, version string) string {
	t.Helper()
	return buildProgram(t, ".", version)
}

// buildProgram builds the program in directory. It puts ours in tableflip's place as a
// user would: by another import path.
func buildProgram(t *testing.T, directory, version string) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "compat")
	switch version {
	case onOurs:
		directory = moved(t, directory)
	case withCompat:
		directory = moved(t, directory)
		withOption(t, directory, "Compat: true")
	case withDraining:
		directory = moved(t, directory)
		withOption(t, directory, "Compat: true, MaxDraining: 1")
	}
	goCommand(t, "build", "-C", directory, "-o", binary, ".")
	return binary
}

// moved returns a module with a copy of the program, in which nothing but the import
// path is not the same.
func moved(t *testing.T, source string) string {
	t.Helper()
	program, err := os.ReadFile(filepath.Join(source, "main.go"))
	if err != nil {
		t.Fatal(err)
	}
	theirs, ours := fmt.Appendf(nil, "\t%q\n", theirPath), fmt.Appendf(nil, "\t%q\n", ourPath)
	if n := bytes.Count(program, theirs); n != 1 {
		t.Fatalf("the program imports %s %d times", theirPath, n)
	}
	library, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	sums, err := os.ReadFile(filepath.Join(library, "go.sum"))
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	for name, content := range map[string][]byte{
		"main.go": bytes.Replace(program, theirs, ours, 1),
		"go.mod":  []byte("module compat\n"),
		"go.sum":  sums,
	} {
		if err := os.WriteFile(filepath.Join(directory, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	goCommand(t, "-C", directory, "mod", "edit", "-require", ourPath+"@v0.0.0", "-replace", ourPath+"="+library)
	goCommand(t, "-C", directory, "mod", "tidy")
	return directory
}

func goCommand(t *testing.T, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.Command("go", args...)
	cmd.Stderr = &stderr
	output, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return string(output)
}

// A session is the running program, all generations of it, and its clients.
type session struct {
	t          *testing.T
	directory  string
	lines      chan string // closed once no process is left
	addrs      map[string]string
	pid        int // of the generation in charge
	kept       net.Conn
	keptLines  *bufio.Reader
	transcript []string
	improved   map[string]string
}

// patience bounds every wait for an event. No test passes because of it.
const patience = 30 * time.Second

func start(t *testing.T, binary string) *session {
	t.Helper()
	syscall.Umask(0o022)
	// Not t.TempDir: a Unix socket's path must be short.
	directory, err := os.MkdirTemp("", "compat")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(directory) })
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, directory)
	cmd.Stdout, cmd.Stderr = write, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	s := &session{
		t:         t,
		directory: directory,
		lines:     make(chan string, 1000),
		addrs:     map[string]string{},
		improved:  map[string]string{},
	}
	go func() {
		defer close(s.lines)
		defer read.Close()
		for lines := bufio.NewScanner(read); lines.Scan(); {
			s.lines <- lines.Text()
		}
	}()
	reaped := make(chan struct{})
	go func() {
		cmd.Wait()
		close(reaped)
	}()
	t.Cleanup(func() {
		if t.Failed() {
			cmd.Process.Kill()
			if s.pid != 0 {
				syscall.Kill(s.pid, syscall.SIGKILL)
			}
		}
		<-reaped
	})
	s.awaitServing()
	return s
}

func (s *session) note(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	s.transcript = append(s.transcript, strings.ReplaceAll(line, s.directory, "DIRECTORY"))
}

// next returns the next line that the program tells, and false at its end.
func (s *session) next() (string, bool) {
	s.t.Helper()
	select {
	case line, ok := <-s.lines:
		return line, ok
	case <-time.After(patience):
		s.t.Fatalf("the program is silent, after %q", s.transcript)
		return "", false
	}
}

// awaitServing returns when a new generation is in charge and alone.
func (s *session) awaitServing() {
	s.t.Helper()
	for {
		line, ok := s.next()
		if !ok {
			s.t.Fatalf("the program has ended, after %q", s.transcript)
		}
		switch fields := strings.Fields(line); fields[0] {
		case "addr":
			if known := s.addrs[fields[1]]; known != "" && known != fields[2] {
				s.t.Errorf("%s was at %s, and is at %s", fields[1], known, fields[2])
			}
			s.addrs[fields[1]] = fields[2]
		case "serving":
			s.pid, _ = strconv.Atoi(fields[1])
			return
		case "upgrade:":
			// What tableflip says for a moment after Ready and WaitForParent.
			if strings.HasSuffix(line, "not ready yet") || strings.HasSuffix(line, "parent hasn't exited") {
				s.hangUp()
				continue
			}
			s.t.Fatal(line)
		default:
			s.note("%s", line)
		}
	}
}

func (s *session) hangUp() {
	if err := syscall.Kill(s.pid, syscall.SIGHUP); err != nil {
		s.t.Fatal(err)
	}
}

func (s *session) upgrade() {
	s.t.Helper()
	s.hangUp()
	s.awaitServing()
}

// observe is what the service looks like from outside.
func (s *session) observe() {
	s.t.Helper()
	for _, name := range slices.Sorted(maps.Keys(s.addrs)) {
		network := map[string]string{"unix": "unix", "udp": "udp", "called": "udp", "addedpacket": "udp"}[name]
		if network == "" {
			network = "tcp"
		}
		conn := s.dial(network, s.addrs[name])
		s.note("%s answers: %s", name, s.ask(conn, bufio.NewReader(conn), "who"))
		conn.Close()
	}
	path := filepath.Join(s.directory, "pid")
	content, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		s.t.Fatal(err)
	}
	s.note("the PID file names the generation in charge: %t", string(content) == strconv.Itoa(s.pid))
	s.improved["the PID file's mode"] = info.Mode().String()
}

func (s *session) dial(network, addr string) net.Conn {
	s.t.Helper()
	conn, err := net.DialTimeout(network, addr, patience)
	if err != nil {
		s.t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(patience))
	return conn
}

func (s *session) ask(conn net.Conn, answers *bufio.Reader, request string) string {
	s.t.Helper()
	if _, err := fmt.Fprintln(conn, request); err != nil {
		s.t.Fatal(err)
	}
	answer, err := answers.ReadString('\n')
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(answer)
}

// keep opens a connection that outlives upgrades.
func (s *session) keep() {
	s.t.Helper()
	s.kept = s.dial("tcp", s.addrs["tcp"])
	s.t.Cleanup(func() { s.kept.Close() })
	s.keptLines = bufio.NewReader(s.kept)
	s.note("the kept connection answers: %s", s.ask(s.kept, s.keptLines, "keep"))
}

func (s *session) observeKept() {
	s.t.Helper()
	s.kept.SetDeadline(time.Now().Add(patience))
	s.note("the kept connection answers: %s", s.ask(s.kept, s.keptLines, "who"))
}

// stop ends the service and observes what is left.
func (s *session) stop() {
	s.t.Helper()
	if err := syscall.Kill(s.pid, syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	for {
		line, ok := s.next()
		if !ok {
			break
		}
		s.note("%s", line)
	}
	s.pid = 0
	s.note("the Unix socket after Stop: %s", s.left("listener"))
	s.improved["the PID file after Stop"] = s.left("pid")
}

func (s *session) left(name string) string {
	switch _, err := os.Lstat(filepath.Join(s.directory, name)); {
	case err == nil:
		return "still there"
	case errors.Is(err, fs.ErrNotExist):
		return "gone"
	default:
		return err.Error()
	}
}
