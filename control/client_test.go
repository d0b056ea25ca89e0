package control

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
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

// An answer that has no end is none, and why there are no events is an error.
func TestClientIsCut(t *testing.T) {
	cut := io.MultiReader(strings.NewReader("process 1"), iotest.ErrReader(io.ErrUnexpectedEOF))
	c := &client{question: "status", http: &http.Client{Transport: answers(func(*http.Request) *http.Response {
		return answered(http.StatusOK, cut)
	})}}
	if _, _, err := c.ask(t.Context()); !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "ended before it had answered") {
		t.Errorf("got %v", err)
	}
	c.http.Transport = answers(func(*http.Request) *http.Response {
		return answered(http.StatusServiceUnavailable, strings.NewReader("32 others read the events already\n"))
	})
	if err := c.follow(t.Context(), func(step) { t.Error("an event") }); err == nil || err.Error() != "32 others read the events already" {
		t.Errorf("got %v", err)
	}
}
