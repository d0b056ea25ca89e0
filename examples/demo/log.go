package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A serverLog is what all processes of the server have logged. It is how they
// say what they do, and it ends when they have ended.
type serverLog struct {
	ended chan struct{}

	mu      sync.Mutex
	records []record
	changed chan struct{} // closed, and replaced, with every record
}

// A record is one line, as log/slog's TextHandler writes it.
type record struct {
	line  string
	value map[string]string
}

// time is when the process logged it, by its own clock, so that no delay on the
// way here matters. It is cut off to milliseconds.
func (r record) time() time.Time {
	at, _ := time.Parse(time.RFC3339, r.value["time"])
	return at
}

// readLog reads from pipe, which it closes at its end.
func readLog(pipe io.ReadCloser) *serverLog {
	l := &serverLog{ended: make(chan struct{}), changed: make(chan struct{})}
	go func() {
		defer close(l.ended)
		defer pipe.Close()
		lines := bufio.NewReader(pipe)
		for {
			line, err := lines.ReadString('\n')
			if line != "" {
				l.add(parseRecord(strings.TrimSuffix(line, "\n")))
			}
			if err != nil {
				return
			}
		}
	}()
	return l
}

func (l *serverLog) add(r record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.records = append(l.records, r)
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *serverLog) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.records)
}

// await returns the first record from index on that has one of the messages. It
// blocks until there is one, or the log ends, which is errGone, or ctx does.
func (l *serverLog) await(ctx context.Context, index int, messages ...string) (record, error) {
	for ended := false; ; {
		l.mu.Lock()
		fresh, changed := l.records[index:], l.changed
		l.mu.Unlock()
		for _, r := range fresh {
			if slices.Contains(messages, r.value["msg"]) {
				return r, nil
			}
		}
		if ended {
			return record{}, errGone
		}
		index += len(fresh)
		select {
		case <-changed:
		case <-l.ended:
			ended = true
		case <-ctx.Done():
			return record{}, context.Cause(ctx)
		}
	}
}

// hasEnded reports whether no process of the server is left.
func (l *serverLog) hasEnded() bool {
	select {
	case <-l.ended:
		return true
	default:
		return false
	}
}

// endsIn reports whether the log ends before the bound has passed.
func (l *serverLog) endsIn(bound time.Duration) bool {
	select {
	case <-l.ended:
		return true
	case <-time.After(bound):
		return false
	}
}

// firstError returns the first error that the server has reported.
func (l *serverLog) firstError() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.records {
		if r.value["level"] == "ERROR" {
			return fmt.Errorf("the server logged an error: %s", r.line)
		}
	}
	return nil
}

// tail is for the end of an error's text.
func (l *serverLog) tail() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.records) == 0 {
		return "\nIt has logged nothing."
	}
	var text strings.Builder
	text.WriteString("\nThe last that it has logged:")
	for _, r := range l.records[max(0, len(l.records)-10):] {
		text.WriteString("\n\t" + r.line)
	}
	return text.String()
}

// parseRecord returns the fields up to the first that it can't read: other lines
// are in the log too, such as those of a panic.
func parseRecord(line string) record {
	r := record{line: line, value: map[string]string{}}
	for rest := line; ; {
		key, tail, found := strings.Cut(strings.TrimLeft(rest, " "), "=")
		if !found {
			return r
		}
		if quoted, err := strconv.QuotedPrefix(tail); err == nil {
			r.value[key], _ = strconv.Unquote(quoted)
			rest = tail[len(quoted):]
		} else {
			r.value[key], rest, _ = strings.Cut(tail, " ")
		}
	}
}
