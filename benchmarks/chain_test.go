//go:build unix

package benchmarks

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// This file is the driver's side of a chain: a line of processes, each started
// by an upgrade of the one before. All of them share one standard input, from
// which the generation in charge reads commands, and one standard output, on
// which it answers. generation_test.go is the other side.

type chain struct {
	tb       testing.TB
	commands *os.File
	answers  *bufio.Reader
	serving  serving
}

// startChain starts the first generation of c, which listens on n TCP listeners
// and one UDP socket, and waits until it serves.
func startChain(tb testing.TB, c contender, n int) *chain {
	tb.Helper()
	commandsRead, commandsWrite, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	answersRead, answersWrite, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s", contenderVariable, c), fmt.Sprintf("%s=%d", countVariable, n))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = commandsRead, answersWrite, os.Stderr
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	commandsRead.Close()
	answersWrite.Close()
	ch := &chain{tb: tb, commands: commandsWrite, answers: bufio.NewReader(answersRead)}
	tb.Cleanup(func() {
		commandsWrite.Close() // a generation without commands exits
		ch.awaitEnd()
		answersRead.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	ch.awaitServing()
	return ch
}

// upgrade replaces the generation in charge and returns how long it took that
// process. When upgrade returns, the process has exited and the next one serves.
func (ch *chain) upgrade() time.Duration {
	ch.tb.Helper()
	ch.command(commandUpgrade)
	var nanoseconds int64
	ch.answer("upgraded %d\n", &nanoseconds)
	ch.awaitServing()
	return time.Duration(nanoseconds)
}

// cpu returns the CPU time that the generation in charge has used.
func (ch *chain) cpu() time.Duration {
	ch.tb.Helper()
	ch.command(commandCPU)
	var nanoseconds int64
	ch.answer("cpu %d\n", &nanoseconds)
	return time.Duration(nanoseconds)
}

func (ch *chain) command(command byte) {
	ch.tb.Helper()
	if _, err := ch.commands.Write([]byte{command}); err != nil {
		ch.tb.Fatal(err)
	}
}

func (ch *chain) awaitServing() {
	ch.tb.Helper()
	ch.serving = serving{}
	ch.answer(servingFormat, &ch.serving.pid, &ch.serving.inherited, &ch.serving.tcp, &ch.serving.udp)
}

func (ch *chain) answer(format string, values ...any) {
	ch.tb.Helper()
	line, err := ch.answers.ReadString('\n')
	if err != nil {
		ch.tb.Fatalf("waiting for %q: %v", strings.TrimSpace(format), err)
	}
	if _, err := fmt.Sscanf(line, format, values...); err != nil {
		ch.tb.Fatalf("waiting for %q: got %q: %v", strings.TrimSpace(format), line, err)
	}
}

// awaitEnd waits until no process of the chain has its standard output open.
func (ch *chain) awaitEnd() {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			if _, err := ch.answers.ReadString('\n'); err != nil {
				return
			}
		}
	}()
	select {
	case <-ended:
	case <-time.After(patience):
		ch.tb.Errorf("process %d did not exit", ch.serving.pid)
		if ch.serving.pid > 0 {
			syscall.Kill(ch.serving.pid, syscall.SIGKILL)
		}
	}
}

// TestChain shows that what is measured works: that the listener and the socket
// of the first generation are served by the third.
func TestChain(t *testing.T) {
	for _, c := range contenders {
		t.Run(string(c), func(t *testing.T) {
			ch := startChain(t, c, 4)
			first := ch.serving
			for range 2 {
				ch.upgrade()
			}
			if !ch.serving.inherited || ch.serving.pid == first.pid {
				t.Errorf("got process %+v after %+v, want a child", ch.serving, first)
			}
			if ch.serving.tcp != first.tcp || ch.serving.udp != first.udp {
				t.Errorf("got the addresses of %+v, want those of %+v", ch.serving, first)
			}
			if err := greeted(first.tcp); err != nil {
				t.Error(err)
			}
			if err := exchange(first.udp, 1); err != nil {
				t.Error(err)
			}
		})
	}
}
