//go:build unix

package proctest

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
)

// A Logbook receives what a Logger writes, one line for each message.
type Logbook chan string

// NewLogger returns a logger and the Logbook that it writes to.
func NewLogger() (*slog.Logger, Logbook) {
	lines := make(Logbook, 1000)
	return slog.New(slog.NewTextHandler(lines, nil)), lines
}

func (l Logbook) Write(line []byte) (int, error) {
	l <- string(line)
	return len(line), nil
}

// Await returns the next line that contains text. Lines before it are dropped.
func (l Logbook) Await(t testing.TB, text string) string {
	t.Helper()
	for {
		if line := Within(t, "the log to say "+text, l); strings.Contains(line, text) {
			return line
		}
	}
}

// An Output is what processes write to a pipe or a terminal, line by line. Its methods,
// except for Read, are for the goroutine of the test.
type Output struct {
	t     testing.TB
	lines Journal[string]
	seen  int // by Await
}

// NewOutput returns an Output that shows what it holds if the test fails.
func NewOutput(t testing.TB) *Output {
	o := &Output{t: t}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("output:\n%s", strings.Join(o.lines.All(), "\n"))
		}
	})
	return o
}

// Read adds lines until nobody writes any more. It closes from.
func (o *Output) Read(from io.ReadCloser) {
	defer from.Close()
	defer o.lines.End()
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		o.lines.Add(lines.Text())
	}
}

// Await returns the next line that has all these parts, after the last that was
// awaited.
func (o *Output) Await(parts ...string) (found string) {
	o.t.Helper()
	o.lines.Await(o.t, fmt.Sprintf("a line with %q", parts), func(lines []string) bool {
		i := slices.IndexFunc(lines[o.seen:], func(line string) bool { return containsAll(line, parts) })
		if i < 0 {
			return false
		}
		found = lines[o.seen+i]
		o.seen += i + 1
		return true
	})
	return found
}

func containsAll(line string, parts []string) bool {
	return !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) })
}

// Count returns how many lines there are with this part.
func (o *Output) Count(part string) (n int) {
	for _, line := range o.lines.All() {
		if strings.Contains(line, part) {
			n++
		}
	}
	return n
}
