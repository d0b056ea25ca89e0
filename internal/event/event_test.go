package event

import (
	"bytes"
	"log/slog"
	"sync"
	"testing"
	"time"
)

func TestPublish(t *testing.T) {
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	first, cancelFirst := Subscribe()
	second, cancelSecond := Subscribe()
	defer cancelSecond()

	before := time.Now()
	Publish(logger.With("pid", 1, "version", "v1"), slog.LevelInfo, Started, slog.Int("pid", 7))
	Publish(nil, slog.LevelError, Failed)
	if want := "level=INFO msg=\"tableflip: started\" pid=1 version=v1 process.pid=7\n"; log.String() != want {
		t.Errorf("the log says %q, want %q", log.String(), want)
	}
	for _, events := range []<-chan Event{first, second} {
		e := <-events
		if e.Name != Started || e.Level != slog.LevelInfo || e.Time.Before(before) || len(e.Attrs) != 1 || !e.Attrs[0].Equal(slog.Int("pid", 7)) {
			t.Errorf("got %v", e)
		}
		if e := <-events; e.Name != Failed || e.Level != slog.LevelError || len(e.Attrs) != 0 {
			t.Errorf("got %v", e)
		}
	}

	cancelFirst()
	cancelFirst()
	Publish(nil, slog.LevelInfo, Ready)
	if e, ok := <-first; ok {
		t.Errorf("got %v after the end of the subscription", e)
	}
	if e := <-second; e.Name != Ready {
		t.Errorf("got %v", e)
	}
}

func TestPublishGroups(t *testing.T) {
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{}
		}
		return a
	}}))
	Publish(logger, slog.LevelInfo, Ended, slog.Int("pid", 7), slog.Bool("a", true), slog.Int("generation", 2),
		slog.String("version", "v"), slog.String("revision", "r"))
	Publish(logger, slog.LevelError, Failed, slog.String("cause", "child"))
	want := "msg=\"tableflip: ended\" process.pid=7 process.generation=2 process.version=v process.revision=r a=true\n" +
		"msg=\"tableflip: failed\" cause=child\n"
	if log.String() != want {
		t.Errorf("the log says\n%s, want\n%s", &log, want)
	}
}

// A subscriber that is stuck misses events, and nobody waits for it.
func TestPublishStuck(t *testing.T) {
	stuck, cancelStuck := Subscribe()
	reader, cancelReader := Subscribe()
	defer cancelReader()
	for range 3 * backlog {
		Publish(nil, slog.LevelInfo, Here)
		<-reader
	}
	cancelStuck()
	got := 0
	for range stuck {
		got++
	}
	if got != backlog {
		t.Errorf("the subscriber that was stuck got %d events, want the first %d", got, backlog)
	}
}

func TestSubscribeRace(t *testing.T) {
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 100 {
				_, cancel := Subscribe()
				Publish(nil, slog.LevelInfo, Ended)
				cancel()
			}
		})
	}
	all.Wait()
	if len(subscribers) != 0 {
		t.Errorf("%d subscribers are left", len(subscribers))
	}
}
