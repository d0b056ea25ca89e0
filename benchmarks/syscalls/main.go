//go:build linux

// Command syscalls counts the system calls of an upgrade by strace(1), which do not depend
// on how busy the machine is, and prints a table for README.md:
//
//	go run ./syscalls -listeners 1,10,400,4000
//
// It counts those of the old process until Upgrade has returned, and those of the new one,
// from its execve until it serves, without what the Go runtime does for its threads.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	hand "example.com/tableflip/benchmarks/handover"
)

// runtimes are the calls that depend on when which thread runs.
const runtimes = "futex,nanosleep,sched_yield,epoll_pwait,getpid,tgkill,madvise,restart_syscall," +
	"rt_sigaction,rt_sigprocmask,rt_sigreturn,sigaltstack,gettid"

func main() {
	listeners := flag.String("listeners", "1,10,400,4000", "`numbers` of listeners")
	flag.Parse()
	if err := run(*listeners, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "syscalls:", err)
		os.Exit(1)
	}
}

func run(listeners string, out io.Writer) error {
	dir, err := os.MkdirTemp("", "syscalls")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "chain")
	build := exec.Command("go", "build", "-trimpath", "-o", binary, "example.com/tableflip/benchmarks/servers/chain")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return err
	}

	fmt.Fprint(out, "| listeners |")
	for _, c := range hand.Contenders {
		fmt.Fprintf(out, " %s: old process | new |", c)
	}
	fmt.Fprintf(out, "\n| --- |%s\n", strings.Repeat(" --- | --- |", len(hand.Contenders)))
	for word := range strings.SplitSeq(listeners, ",") {
		n, err := strconv.Atoi(word)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "| %d |", n)
		for _, c := range hand.Contenders {
			before, after, err := upgrade(binary, c, n, filepath.Join(dir, "trace"))
			if err != nil {
				return fmt.Errorf("%s with %d listeners: %w", c, n, err)
			}
			fmt.Fprintf(out, " %d | %d |", before, after)
		}
		fmt.Fprintln(out)
	}
	return nil
}

// upgrade counts the calls of an upgrade in which everything is inherited.
func upgrade(binary string, c hand.Contender, n int, trace string) (before, after int, err error) {
	script := trace + ".sh"
	content := fmt.Sprintf("#!/bin/sh\nexec strace -f -s 16 -e trace=!%s -o %s %s\n", runtimes, trace, binary)
	if err := os.WriteFile(script, []byte(content), 0o700); err != nil {
		return 0, 0, err
	}
	ch, err := hand.Start(script, c, n)
	if err != nil {
		return 0, 0, err
	}
	var pids []int
	for range 2 {
		if _, err = ch.Upgrade(); err != nil {
			break
		}
		pids = append(pids, ch.Serving.PID)
	}
	if err := errors.Join(err, ch.Close()); err != nil { // then the trace is complete
		return 0, 0, err
	}
	seen, err := os.ReadFile(trace)
	if err != nil {
		return 0, 0, err
	}
	before, after = count(string(seen), pids[0], pids[1])
	if before == 0 || after == 0 {
		return 0, 0, fmt.Errorf("the trace is not what it should be: %.200s", seen)
	}
	return before, after, nil
}

var (
	line    = regexp.MustCompile(`^(\d+) +(\w+)\((.*)$`)
	command = regexp.MustCompile(`read.*"u"`)
	thread  = regexp.MustCompile(`^(\d+) .*(CLONE_THREAD|clone3? resumed).* = (\d+)$`)
)

// count returns the calls of the old process from the command to upgrade to its writing
// that it was replaced, and those of the new one from its execve to its writing that it
// serves.
func count(trace string, old, fresh int) (before, after int) {
	process := map[string]int{strconv.Itoa(old): old, strconv.Itoa(fresh): fresh} // by thread
	told, replaced, executes, serves := false, false, false, false
	for text := range strings.Lines(trace) {
		text = strings.TrimSuffix(text, "\n")
		told = told || process[strings.Fields(text)[0]] == old && command.MatchString(text)
		if m := thread.FindStringSubmatch(text); m != nil && process[m[3]] == 0 {
			process[m[3]] = process[m[1]]
		}
		m := line.FindStringSubmatch(text)
		if m == nil {
			continue
		}
		switch call := m[2]; process[m[1]] {
		case old:
			replaced = replaced || call == "write" && strings.Contains(m[3], `"upgraded `)
			if told && !replaced {
				before++
			}
		case fresh:
			serves = serves || call == "write" && strings.Contains(m[3], `"serving `)
			if executes && !serves {
				after++
			}
			executes = executes || call == "execve"
		}
	}
	return before, after
}
