package control

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"example.com/tableflip/internal/event"
)

func TestStep(t *testing.T) {
	when := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.UTC)
	local := when.Local().Format("2006-01-02 15:04:05.000")
	for _, test := range []struct {
		attrs      []slog.Attr
		text, json string
	}{
		{
			[]slog.Attr{slog.Int("pid", 7), slog.Duration("took", 1500*time.Millisecond+time.Nanosecond), slog.Bool("rehearsal", true), slog.Uint64("size", 1<<63), slog.Any("error", io.ErrUnexpectedEOF)},
			`error="unexpected EOF" pid=7 rehearsal=true size=9223372036854775808 took=1.5`,
			`"error":"unexpected EOF","event":"ended","pid":7,"rehearsal":true,"size":9223372036854775808,"time":"2026-01-02T03:04:05.006Z","took":1.5`,
		},
		{nil, fmt.Sprint("pid=", os.Getpid()), fmt.Sprintf(`"event":"ended","pid":%d,"time":"2026-01-02T03:04:05.006Z"`, os.Getpid())},
	} {
		s := stepOf(event.Event{Time: when, Name: event.Ended, Attrs: test.attrs})
		want := local + " ended " + test.text
		if got := s.String(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		content := encode(s)
		if want := "{" + test.json + "}"; string(content) != want {
			t.Errorf("got %s, want %s", content, want)
		}
		var read step
		if err := json.Unmarshal(content, &read); err != nil || read.String() != want || !read.time.Equal(when) {
			t.Errorf("read %v, %v, want %s", read, err, want)
		}
	}
	for _, text := range []string{`{}`, `null`, `[]`, `{"event":7,"time":"2026-01-02T03:04:05Z"}`, `{"event":"ended"}`, `{"event":"ended","time":"noon"}`} {
		if err := json.Unmarshal([]byte(text), new(step)); err == nil {
			t.Errorf("%s was read", text)
		}
	}
}

// A reader of events who leaves makes room for another, also if nothing happens.
func TestWatchersLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := serveInMemory(t)
		for question, kind := range map[string]string{"GET /events": "text/plain; charset=utf-8", "GET /events?json": "application/x-ndjson"} {
			for range maxWatchers {
				conn := ln.ask(t, question+" HTTP/1.0\r\n\r\n")
				answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil || answer.StatusCode != http.StatusOK || answer.Header.Get("Content-Type") != kind {
					t.Fatalf("answered %v, %v, want %s", answer, err, kind)
				}
				conn.Close()
				synctest.Wait()
			}
		}
	})
}

// A cutWriter fails after a number of writes, each of which takes a second.
type cutWriter struct {
	http.ResponseWriter
	left  int
	after int // how often it was used after it had failed
}

func (w *cutWriter) Write(content []byte) (int, error) {
	time.Sleep(time.Second)
	w.left--
	if w.left < 0 {
		w.after = -1 - w.left
		return 0, errors.ErrUnsupported
	}
	return len(content), nil
}

func (w *cutWriter) FlushError() error { return nil }

// Nothing more is written to a reader that is cut, whenever that happens.
func TestWatchIsCut(t *testing.T) {
	const events = 4
	for left := range events {
		for range 8 { // the runtime chooses what is noticed first
			synctest.Test(t, func(t *testing.T) {
				ctl, err := New(newMemoryUpgrader(), "", Options{})
				if err != nil {
					t.Fatal(err)
				}
				w := &cutWriter{ResponseWriter: httptest.NewRecorder(), left: left}
				watched := make(chan struct{})
				go func() {
					defer close(watched)
					ctl.watch(w, httptest.NewRequest(http.MethodGet, "/events", nil))
				}()
				synctest.Wait()
				for range events {
					event.Publish(nil, slog.LevelInfo, "test")
				}
				time.Sleep(1500 * time.Millisecond)
				ctl.Close()
				<-watched
				if w.after > 0 {
					t.Errorf("%d writes failed after %d", 1+w.after, left)
				}
			})
		}
	}
}
