//go:build linux

// Command crash measures what becomes of a service when a version is deployed that crashes
// one second after it is ready, five times in a row: how long nobody answers, and how many
// requests fail. It prints a table for README.md.
//
//	go run ./crash
//
// Those under systemd run on a machine of their own, for which it must be root.
//
// nginx, HAProxy and Caddy are not measured, because what is deployed to them is a
// configuration, not a new version of a program.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/machine"
)

// inARow is how many times the version crashes.
const inARow = 5

// crashAfter is when, after it is ready.
const crashAfter = time.Second

// A row is a way to run and deploy a service.
type row struct {
	under   string // who restarts it
	title   string
	program string // a folder of server
	args    []string

	signal syscall.Signal // that deploys, if it is not SIGHUP
	master bool           // whether the signal is for the process that was started

	unit, socket string // of systemd
	deploy       string // by systemctl
}

const (
	shell    = "a shell"
	superior = "tableflip-supervise"
	systemd  = "systemd"
)

const (
	notifyUnit = "Type=notify\nExecReload=/bin/kill -HUP $MAINPID\n"
	// As tableflip's README has it. endless's names a PID file, but no unit.
	pidFileUnit = "PIDFile=/run/server.pid\nExecReload=/bin/kill -HUP $MAINPID\n"
	// overseer's main process stays.
	masterUnit = "ExecReload=/bin/kill -USR2 $MAINPID\n"
)

// There is no row for grace under systemd. Its documentation names neither a Type nor a PID
// file, and without them systemd ends the service when the old process ends.
var rows = []row{
	{under: shell, title: "tableflip 1.2.3", program: "tableflip"},
	{under: shell, title: "endless", program: "endless"},
	{under: shell, title: "grace", program: "grace", signal: syscall.SIGUSR2},
	{under: shell, title: "overseer", program: "overseer", signal: syscall.SIGUSR2, master: true},
	{under: shell, title: "this, no trial", program: "ours"},
	{under: shell, title: "this, with a trial", program: "ours", args: onTrial},
	{under: superior, title: "this, no trial", program: "ours", master: true},
	{under: superior, title: "this, with a trial", program: "ours", args: onTrial, master: true},
	{under: systemd, title: "net/http, `systemctl restart`", program: "nethttp", unit: "Type=exec\n", deploy: "restart"},
	{under: systemd, title: "the same, with a socket unit", program: "nethttp", unit: "Type=exec\n", socket: "ListenStream=" + machineAddr + "\n", deploy: "restart"},
	{under: systemd, title: "tableflip 1.2.3", program: "tableflip", args: []string{"-pid-file", "/run/server.pid"}, unit: pidFileUnit, deploy: "reload"},
	{under: systemd, title: "endless", program: "endless", args: []string{"-pid-file", "/run/server.pid"}, unit: pidFileUnit, deploy: "reload"},
	{under: systemd, title: "overseer", program: "overseer", unit: masterUnit, deploy: "reload"},
	{under: systemd, title: "this, no trial", program: "ours", unit: notifyUnit, deploy: "reload"},
	{under: systemd, title: "this, with a trial", program: "ours", args: onTrial, unit: notifyUnit, deploy: "reload"},
}

// onTrial is longer than crashAfter.
var onTrial = []string{"-trial", "3s"}

func main() {
	if content := os.Getenv(taskVariable); content != "" {
		if err := onMachine(content); err != nil {
			fail(err)
		}
		return
	}
	rounds := flag.Int("rounds", 2, "`number` of times that each is measured")
	only := flag.String("only", "", "`text` that is in what is measured, such as \"systemd: this\"")
	flag.Parse()
	dir, err := os.MkdirTemp("", "crash")
	if err == nil {
		defer os.RemoveAll(dir)
		err = run(dir, *rounds, *only)
	}
	if err != nil {
		os.RemoveAll(dir)
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "crash:", err)
	os.Exit(1)
}

func run(built string, rounds int, only string) error {
	if err := build(built); err != nil {
		return err
	}
	whyNot := machine.Missing("")
	if whyNot != "" {
		fmt.Fprintln(os.Stderr, "nothing is measured under systemd:", whyNot)
	}
	crashes := make([][]crash, len(rows))
	for round := range rounds {
		for _, i := range rand.Perm(len(rows)) {
			r := rows[i]
			name := r.under + ": " + r.title
			if !strings.Contains(name, only) || r.under == systemd && whyNot != "" {
				continue
			}
			fmt.Fprintf(os.Stderr, "round %d: under %s\n", round+1, name)
			measured, err := measure(task{i, inARow, built})
			if err != nil {
				return fmt.Errorf("under %s: %w", name, err)
			}
			crashes[i] = append(crashes[i], measured...)
		}
	}
	fmt.Print(table(crashes))
	return nil
}

// build compiles two versions of each server, a good one and one that crashes.
func build(dir string) error {
	for version, after := range map[string]string{good: "", bad: crashAfter.String()} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, version)+"/",
			"-ldflags", "-X example.com/tableflip/benchmarks/crash/server.crashAfter="+after,
			"./crash/server/...", "example.com/tableflip/cmd/tableflip-supervise")
		cmd.Stderr = os.Stderr
		if err := os.Mkdir(filepath.Join(dir, version), 0o755); err != nil {
			return err
		}
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("building the servers (run this in the folder benchmarks): %w", err)
		}
	}
	return nil
}

// A task is to measure a row.
type task struct {
	Row, Number int
	Built       string // the directory of the binaries
}

// taskVariable holds, in the process that is init on a machine, its task.
const taskVariable = "CRASH_TASK"

const machineAddr = "127.0.0.1:8080"

// measure returns what the crashes of a row came to.
func measure(t task) (crashes []crash, err error) {
	r := rows[t.Row]
	if r.under == systemd {
		content, err := json.Marshal(t)
		if err != nil {
			return nil, err
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), taskVariable+"="+string(content))
		var output bytes.Buffer
		cmd.Stdout, cmd.Stderr = &output, os.Stderr
		if err := machine.Run(cmd); err != nil {
			return nil, err
		}
		return crashes, json.Unmarshal(output.Bytes(), &crashes)
	}
	addrs, err := load.FreeAddresses(1)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(t.Built, "row")
	if err != nil {
		return nil, err
	}
	p := &process{service: service{row: r, built: t.Built, dir: dir, addr: addrs[0]}}
	defer p.stop()
	return observe(p, t.Number, 2*time.Second)
}

// onMachine prints in JSON what measure returns.
func onMachine(content string) error {
	runtime.LockOSThread() // see Boot
	var t task
	if err := json.Unmarshal([]byte(content), &t); err != nil {
		return err
	}
	r, own := rows[t.Row], machine.Machine{Directory: "/usr/local/bin", Shared: t.Built}
	u := &unit{service{row: r, built: t.Built, dir: own.Directory, addr: machineAddr}}
	own.UnitFiles = u.files()
	if _, _, err := own.Boot(); err != nil {
		return err
	}
	crashes, err := observe(u, t.Number, 10*time.Second)
	if err != nil {
		journal, _ := exec.Command("journalctl", "--no-pager").Output()
		return fmt.Errorf("%w; the journal:\n%s", err, journal)
	}
	return json.NewEncoder(os.Stdout).Encode(crashes)
}

// table returns medians and ranges in Markdown.
func table(all [][]crash) string {
	var b strings.Builder
	fmt.Fprintln(&b, "| under | deployed by | next good answer, ms | failed requests per crash | of |\n| --- | --- | --- | --- | --- |")
	for i, crashes := range all {
		if len(crashes) == 0 {
			continue
		}
		var gaps, failed, sent []time.Duration
		for _, c := range crashes {
			gaps = append(gaps, c.Gap)
			failed = append(failed, time.Duration(c.Failed))
			sent = append(sent, time.Duration(c.Sent))
		}
		number := func(n time.Duration) string { return fmt.Sprint(int(n)) }
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", rows[i].under, rows[i].title,
			summary(gaps, gapText), summary(failed, number), summary(sent, number))
	}
	return b.String()
}

func gapText(d time.Duration) string {
	if d == never {
		return "never"
	}
	return fmt.Sprintf("%.0f", float64(d)/float64(time.Millisecond))
}

func summary[T cmp.Ordered](values []T, text func(T) string) string {
	slices.Sort(values)
	median, low, high := text(values[len(values)/2]), text(values[0]), text(values[len(values)-1])
	if low == high {
		return median
	}
	return median + " (" + low + "–" + high + ")"
}
