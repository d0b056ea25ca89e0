package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestParseRecord(t *testing.T) {
	var line bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&line, nil))
	before := time.Now().Truncate(time.Millisecond)
	logger.Error("upgrade failed", "took", 1500*time.Millisecond, "error", "it says: \"a=b\"\nand more", "empty", "", "last", 1)

	r := parseRecord(strings.TrimSuffix(line.String(), "\n"))
	for key, want := range map[string]string{
		"level": "ERROR",
		"msg":   "upgrade failed",
		"took":  "1.5s",
		"error": "it says: \"a=b\"\nand more",
		"empty": "",
		"last":  "1",
	} {
		if got, ok := r.value[key]; !ok || got != want {
			t.Errorf("%s is %q instead of %q", key, got, want)
		}
	}
	if at := r.time(); at.Before(before) || at.After(time.Now()) {
		t.Errorf("logged at %v, read as %v", before, at)
	}
}

func TestParseRecordOfOtherLines(t *testing.T) {
	for _, line := range []string{"", " ", "=", "panic: help", "goroutine 1 [running]:", `a="open`, `a="b"c=d`, "x y=z"} {
		r := parseRecord(line)
		if r.line != line {
			t.Errorf("%q became %q", line, r.line)
		}
		if msg, ok := r.value["msg"]; ok {
			t.Errorf("%q has the message %q", line, msg)
		}
		if !r.time().IsZero() {
			t.Errorf("%q has a time", line)
		}
	}
}

func TestAwait(t *testing.T) {
	read, write := io.Pipe()
	l := readLog(read)
	io.WriteString(write, "msg=one n=1\nsomething else\nmsg=two\nmsg=one n=2\n")

	if r, err := l.await(t.Context(), 0, "two"); err != nil || r.value["msg"] != "two" {
		t.Error(r, err)
	}
	if r, err := l.await(t.Context(), 1, "one"); err != nil || r.value["n"] != "2" {
		t.Error("the first from an index on:", r, err)
	}
	if n := l.len(); n != 4 {
		t.Error(n, "records")
	}

	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	if _, err := l.await(ctx, 0, "three"); !errors.Is(err, cause) {
		t.Error("after the end of the context:", err)
	}
	if l.hasEnded() {
		t.Error("it has ended")
	}

	io.WriteString(write, "level=ERROR msg=three last=x") // no newline
	write.Close()
	if r, err := l.await(t.Context(), 4, "three"); err != nil || r.value["last"] != "x" {
		t.Error("the last:", r, err)
	}
	if _, err := l.await(t.Context(), 0, "four"); !errors.Is(err, errGone) {
		t.Error("after the end:", err)
	}
	if !l.hasEnded() {
		t.Error("it has not ended")
	}
	if err := l.firstError(); err == nil || !strings.Contains(err.Error(), "msg=three") {
		t.Error("first error:", err)
	}
	if tail := l.tail(); !strings.Contains(tail, "\n\tsomething else\n") {
		t.Error("tail:", tail)
	}
}
