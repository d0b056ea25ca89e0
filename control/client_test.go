package control

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"example.com/tableflip/internal/event"
)

func TestClientParse(t *testing.T) {
	t.Setenv("TABLEFLIP_CONTROL", "")
	for _, test := range []struct {
		arguments string
		says      string // with an error, if it is not empty
	}{
		{"-s ctl status", ""},
		{"-s ctl -json -wait upgrade", ""},
		{"status", "it takes the path of a socket: -s"},
		{"-s ctl", "it takes one of upgrade, rehearse"},
		{"-s ctl status stop", "it takes one of upgrade, rehearse"},
		{"-s ctl restart", `not ["restart"]`},
		{"-s ctl -force status", "-force"},
		{"-h", "print JSON"}, // the flags, and
		{"-h", "Exit status: 0 done"},
	} {
		path := filepath.Join(t.TempDir(), "stderr")
		file, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		c, err := parse(strings.Fields(test.arguments), file)
		said, _ := os.ReadFile(path)
		if (err == nil) != (test.says == "") || !strings.Contains(string(said), test.says) {
			t.Errorf("%s: got %v, %q, want %q", test.arguments, err, said, test.says)
		}
		if err == nil && (c.socket != "ctl" || len(said) > 0 || c.json != c.wait) {
			t.Errorf("%s: got %+v, and it said %q", test.arguments, c, said)
		}
	}
}

func TestClientReport(t *testing.T) {
	const refusal = `{"error":"refused for now"}` + "\n"
	for _, test := range []struct {
		json           bool
		code           int
		content        string
		stdout, stderr string
		status         int
	}{
		{false, http.StatusOK, "done\n", "done\n", "", exitDone},
		{false, http.StatusConflict, "refused for now\n", "", "refused for now\n", exitRefused},
		{false, http.StatusInternalServerError, refusal, "", refusal, exitFailed},
		{true, http.StatusOK, "{}\n", "{}\n", "", exitDone},
		{true, http.StatusConflict, refusal, refusal, "refused for now\n", exitRefused},
		{true, http.StatusBadGateway, "another server\n", "another server\n", "another server\n", exitFailed},
	} {
		var stdout, stderr bytes.Buffer
		c := &client{json: test.json, stdout: &stdout, stderr: &stderr}
		if status := c.report(test.code, []byte(test.content)); status != test.status || stdout.String() != test.stdout || stderr.String() != test.stderr {
			t.Errorf("%+v: got %d, %q, %q", test, status, &stdout, &stderr)
		}
	}
}

// answers are a client's transport.
type answers func(*http.Request) *http.Response

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return a(r), nil
}

func answered(code int, body io.Reader) *http.Response {
	return &http.Response{StatusCode: code, Body: io.NopCloser(body)}
}

// Who waits asks until it is not refused, or has waited enough.
func TestClientAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		ctx, cancel := context.WithCancel(t.Context())
		c := &client{question: "upgrade", wait: true, http: &http.Client{Transport: answers(func(*http.Request) *http.Response {
			if asked++; asked%3 == 0 {
				return answered(http.StatusOK, strings.NewReader("done"))
			}
			if asked > 3 {
				cancel()
			}
			return answered(http.StatusConflict, strings.NewReader("refused"))
		})}}
		if code, content, err := c.ask(ctx); code != http.StatusOK || string(content) != "done" || err != nil {
			t.Errorf("got %d, %q, %v", code, content, err)
		}
		if _, _, err := c.ask(ctx); !errors.Is(err, context.Canceled) || asked != 4 {
			t.Errorf("the answer %d after it was cancelled is %v", asked, err)
		}
	})
}

// Why there is no answer decides how the command ends.
func TestClientFails(t *testing.T) {
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		ctx      context.Context
		question string
		err      error
		status   int
		stderr   string
	}{
		{cancelled, "events", context.Canceled, exitDone, ""},
		{cancelled, "upgrade", context.Canceled, exitFailed, "interrupted: upgrade is aborted, unless it has just succeeded\n"},
		{t.Context(), "upgrade", &net.OpError{Op: "dial", Err: fs.ErrNotExist}, exitNobody, "nobody answers at ctl: dial: file does not exist\n"},
		{t.Context(), "status", io.ErrUnexpectedEOF, exitFailed, "unexpected EOF\n"},
	} {
		var stderr bytes.Buffer
		c := &client{socket: "ctl", question: test.question, stderr: &stderr}
		if status := c.fail(test.ctx, test.err); status != test.status || stderr.String() != test.stderr {
			t.Errorf("%s, %v: got %d, %q", test.question, test.err, status, &stderr)
		}
	}
}

// An answer that has no end is none.
func TestClientIsCut(t *testing.T) {
	cut := io.MultiReader(strings.NewReader("process 1"), iotest.ErrReader(io.ErrUnexpectedEOF))
	c := &client{question: "status", http: &http.Client{Transport: answers(func(*http.Request) *http.Response {
		return answered(http.StatusOK, cut)
	})}}
	if _, _, err := c.ask(t.Context()); !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "ended before it had answered") {
		t.Errorf("got %v", err)
	}
}

// Why there are no events is an error, also for who waits for a service.
func TestClientFollowsNothing(t *testing.T) {
	for _, test := range []struct {
		code        int
		stream, err string
	}{
		{http.StatusServiceUnavailable, "32 others read the events already\n", "32 others read the events already"},
		{http.StatusOK, "process 1\n", "what ctl streams is unreadable: "},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			c := &client{socket: "ctl", wait: true, http: &http.Client{Transport: answers(func(*http.Request) *http.Response {
				return answered(test.code, strings.NewReader(test.stream))
			})}}
			if err := c.follow(ctx, func(step) { t.Error("an event") }); err == nil || !strings.HasPrefix(err.Error(), test.err) {
				t.Errorf("got %v, want %s", err, test.err)
			}
		})
	}
}

// connectTime is how long it takes until a streamer streams.
const connectTime = time.Millisecond

// A streamer answers one question with a code, after the steps of it were streamed to
// those who follow.
type streamer struct {
	code    int
	steps   []step
	streams []*io.PipeWriter
}

func (s *streamer) answer(r *http.Request) *http.Response {
	if r.URL.Path != "/events" {
		for _, step := range s.steps {
			_, _ = s.streams[0].Write(append(encode(step), '\n'))
		}
		return answered(s.code, strings.NewReader("the answer\n"))
	}
	select {
	case <-time.After(connectTime):
	case <-r.Context().Done():
	}
	body, stream := io.Pipe()
	context.AfterFunc(r.Context(), func() { stream.CloseWithError(r.Context().Err()) })
	s.streams = append(s.streams, stream)
	go stream.Write(append(encode(step{name: watching, attrs: map[string]any{"pid": len(s.streams)}}), '\n'))
	return answered(http.StatusOK, body)
}

// What is shown of an upgrade, or a rehearsal, is complete, and does not hold it up.
func TestClientProgress(t *testing.T) {
	for _, test := range []struct {
		question string
		code     int
		steps    []string
		held     time.Duration // until the events are followed, and for what was not streamed in time
	}{
		{"upgrade", http.StatusOK, []string{event.Started, event.Committed}, connectTime},
		{"rehearse", http.StatusOK, []string{event.Started, event.Rehearsed}, connectTime},
		{"upgrade", http.StatusOK, []string{event.Started}, connectTime + progressTimeout},
		{"upgrade", http.StatusInternalServerError, []string{event.Started, event.Failed}, connectTime},
		{"status", http.StatusOK, nil, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			service := &streamer{code: test.code}
			for _, name := range test.steps {
				// Longer than a line of most streams
				service.steps = append(service.steps, step{time.Now(), name, map[string]any{"pid": 1, "error": strings.Repeat("x", 1<<17)}})
			}
			var stdout, stderr bytes.Buffer
			c := &client{question: test.question, progress: true, stdout: &stdout, stderr: &stderr, http: &http.Client{Transport: answers(service.answer)}}
			began := time.Now()
			c.run(t.Context())
			if held := time.Since(began); held != test.held {
				t.Errorf("%+v took %v", test, held)
			}
			if len(test.steps) == 0 && len(service.streams) > 0 {
				t.Errorf("%+v: the events were followed", test)
			}
			// A failure may be answered before its step is shown: the answer itself says why.
			shown := stderr.String()
			for _, name := range test.steps {
				if test.code == http.StatusOK && !strings.Contains(shown, " "+name+" ") {
					t.Errorf("%+v: %s was not shown", test, name)
				}
			}
		})
	}
}
