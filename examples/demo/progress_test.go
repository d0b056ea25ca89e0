package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestProgressOnTerminal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		p := newProgress(&out, true)
		p.say("a long line: %s", strings.Repeat("x", 100))
		p.say("short")
		l := &load{}
		p.count(l)
		l.served.Store(42)
		<-time.After(redrawInterval + time.Millisecond)
		p.end()
		p.end()

		lines := strings.Split(out.String(), "\r")
		if got := lines[1]; len(got) != 79 {
			t.Errorf("a line of %d", len(got))
		}
		if got := lines[2]; len(got) != 79 || strings.TrimRight(got, " ") != "short" {
			t.Errorf("%q does not overwrite it", got)
		}
		if got := lines[3]; got != "short; 42 requests, 0 failed" {
			t.Errorf("redrawn as %q", got)
		}
		if text := out.String(); strings.Count(text, "\n") != 1 || !strings.HasSuffix(text, "\n") {
			t.Errorf("more than one line in %q", text)
		}
	})
}

func TestProgressElsewhere(t *testing.T) {
	var out strings.Builder
	p := newProgress(&out, false)
	p.say("one")
	p.count(&load{})
	p.say("two")
	p.end()
	p.end()
	if got, want := out.String(), "one\ntwo; 0 requests, 0 failed\n"; got != want {
		t.Errorf("%q instead of %q", got, want)
	}
}

type brokenPipe struct{}

var errBroken = errors.New("broken pipe")

func (brokenPipe) Write([]byte) (int, error) { return 0, errBroken }

func TestStopOnError(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	newProgress(stopOnError{brokenPipe{}, cancel}, false).say("anything")
	if !errors.Is(context.Cause(ctx), errBroken) {
		t.Error(context.Cause(ctx))
	}
}
