//go:build unix

package main

import (
	"bufio"
	"bytes"
	"errors"
	"io/fs"
	"net"
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

// The tests' processes are this binary, started again with a role: the demo itself,
// or a server that misbehaves (server_test.go).
func init() { proctest.Role("demo", main) }

func TestMain(m *testing.M) {
	if i := slices.Index(os.Args, "-ctl"); i > 0 {
		ask(os.Args[i+1])
	}
	proctest.Main(m)
}

// ask is the client of the servers that misbehave. They have no control socket, and are
// asked by a signal.
func ask(question string) {
	if question == "upgrade" {
		pidFile := filepath.Join(filepath.Dir(os.Args[2]), "server.pid") // -control PATH
		pid := proctest.Must(strconv.Atoi(string(proctest.Must(os.ReadFile(pidFile)))))
		proctest.Must(0, syscall.Kill(pid, syscall.SIGHUP))
	}
	os.Exit(0)
}

// patience is for what builds binaries first.
const patience = 4 * proctest.Patience

// A demo is a demo under test.
type demo struct {
	t      *testing.T
	cmd    *exec.Cmd
	folder string // for its temporary files
	lines  *bufio.Scanner
	output []string // the lines that have been read
	stderr bytes.Buffer
}

func startDemo(t *testing.T, args ...string) *demo {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("the demo builds programs: ", err)
	}
	d := &demo{t: t, folder: t.TempDir()}
	d.cmd = exec.Command(os.Args[0], args...)
	d.cmd.Env = append(os.Environ(), proctest.Environment("demo"), "TMPDIR="+d.folder)
	d.cmd.Stderr = &d.stderr
	stdout, err := d.cmd.StdoutPipe()
	proctest.OK(t, err)
	d.lines = bufio.NewScanner(stdout)
	proctest.OK(t, d.cmd.Start())
	late := time.AfterFunc(patience, func() {
		t.Error("the demo takes too long")
		d.cmd.Process.Signal(os.Interrupt)
	})
	t.Cleanup(func() { late.Stop() })
	return d
}

// await returns once the demo has printed a line with this prefix.
func (d *demo) await(prefix string) {
	d.t.Helper()
	for d.lines.Scan() {
		d.output = append(d.output, d.lines.Text())
		if strings.HasPrefix(d.lines.Text(), prefix) {
			return
		}
	}
	d.t.Errorf("the demo did not print %q, but\n%s", prefix, strings.Join(d.output, "\n"))
}

// end waits for the demo's end, checks that nothing is left of it, and returns
// its exit status.
func (d *demo) end() int {
	d.t.Helper()
	for d.lines.Scan() {
		d.output = append(d.output, d.lines.Text())
	}
	var failed *exec.ExitError
	if err := d.cmd.Wait(); err != nil && !errors.As(err, &failed) {
		d.t.Error(err)
	}
	d.checkNothingLeft()
	return d.cmd.ProcessState.ExitCode()
}

var (
	pidOf  = regexp.MustCompile(`PID (\d+)`)
	addrOf = regexp.MustCompile(`127\.0\.0\.1:\d+`)
)

func (d *demo) checkNothingLeft() {
	d.t.Helper()
	files, err := filepath.Glob(filepath.Join(d.folder, "*"))
	if err != nil || len(files) > 0 {
		d.t.Errorf("left behind: %v %v", files, err)
	}
	output := strings.Join(d.output, "\n")
	for _, match := range pidOf.FindAllStringSubmatch(output, -1) {
		pid, _ := strconv.Atoi(match[1])
		proctest.AwaitThat(d.t, "process "+match[1]+" ends", func() bool { return !running(pid) })
	}
	// Processes that are not in the output have the listener or its path.
	if addr := addrOf.FindString(output); addr != "" {
		proctest.AwaitThat(d.t, "nobody listens on "+addr, func() bool {
			conn, err := net.Dial("tcp", addr)
			if err == nil {
				conn.Close()
			}
			return err != nil
		})
	}
	proctest.AwaitThat(d.t, "no process has an argument in "+d.folder, func() bool {
		commands, _ := fs.Glob(os.DirFS("/proc"), "[1-9]*/cmdline")
		return !slices.ContainsFunc(commands, func(file string) bool {
			args, _ := os.ReadFile("/proc/" + file)
			return bytes.Contains(args, []byte(d.folder))
		})
	})
}

func TestDemo(t *testing.T) {
	d := startDemo(t, "-upgrades", "2", "-interval", "100ms")
	status := d.end()
	output := strings.Join(d.output, "\n")
	t.Logf("%s\n%s", output, d.stderr.String())

	rows := regexp.MustCompile(`(?m)^ +(\d+) +(v[12]) +(\d+) +(\S+) +(\d+) +(\d+)$`).FindAllStringSubmatch(output, -1)
	if len(rows) != 3 {
		t.Fatalf("the table has %d rows", len(rows))
	}
	served, failed := 0, 0
	pids := map[string]bool{}
	for i, row := range rows {
		if want := strconv.Itoa(i + 1); row[1] != want {
			t.Errorf("generation %s in the row of %s", row[1], want)
		}
		if want := []string{"v1", "v2", "v1"}[i]; row[2] != want {
			t.Errorf("generation %s is %s instead of %s", row[1], row[2], want)
		}
		pids[row[3]] = true
		if took, err := time.ParseDuration(row[4]); i > 0 && (err != nil || took <= 0) {
			t.Errorf("Upgrade took %q", row[4])
		}
		requests, _ := strconv.Atoi(row[5])
		if requests == 0 {
			t.Errorf("generation %s served nothing", row[1])
		}
		served += requests
		lost, _ := strconv.Atoi(row[6])
		failed += lost
	}
	if len(pids) != 3 {
		t.Errorf("3 generations were %d processes", len(pids))
	}
	want := "2 upgrades, " + strconv.Itoa(served) + " requests served, " + strconv.Itoa(failed) + " failed"
	if !slices.Contains(d.output, want) {
		t.Errorf("the output has no line %q", want)
	}
	if status != 0 || failed != 0 {
		t.Errorf("exit status %d with %d failures", status, failed)
	}
}

func TestInterrupted(t *testing.T) {
	for _, at := range []string{"building", "generation 1:", "upgrade 1 of", "generation 2:", "upgrade 2 of"} {
		t.Run(at, func(t *testing.T) {
			d := startDemo(t, "-upgrades", "2", "-interval", "100ms")
			d.await(at)
			if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
				t.Error(err)
			}
			if status := d.end(); status != 1 {
				t.Errorf("exit status %d", status)
			}
			if message := d.stderr.String(); !strings.Contains(message, "interrupt") {
				t.Errorf("it does not say that it was interrupted, but\n%s", message)
			}
		})
	}
}

func TestNobodyReads(t *testing.T) {
	d := &demo{t: t, folder: t.TempDir()}
	read, write, err := os.Pipe()
	proctest.OK(t, err)
	d.cmd = exec.Command(os.Args[0])
	d.cmd.Env = append(os.Environ(), proctest.Environment("demo"), "TMPDIR="+d.folder)
	d.cmd.Stdout, d.cmd.Stderr = write, &d.stderr
	read.Close()
	err = d.cmd.Run()
	write.Close()
	if status := d.cmd.ProcessState.ExitCode(); status != 1 {
		t.Errorf("%v\n%s", err, d.stderr.String())
	}
	d.checkNothingLeft()
}
