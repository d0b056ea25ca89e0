//go:build unix

package proctest

import (
	"log/slog"
	"strings"
	"testing"
)

// A Logbook is where a Logger writes, one line a message.
type Logbook chan string

// NewLogger returns a logger and what it writes.
func NewLogger() (*slog.Logger, Logbook) {
	lines := make(Logbook, 1000)
	return slog.New(slog.NewTextHandler(lines, nil)), lines
}

func (l Logbook) Write(line []byte) (int, error) {
	l <- string(line)
	return len(line), nil
}

// Await returns the next line that says this. Others before it are dropped.
func (l Logbook) Await(t testing.TB, text string) string {
	t.Helper()
	for {
		if line := Within(t, "the log to say "+text, l); strings.Contains(line, text) {
			return line
		}
	}
}
