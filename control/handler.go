package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/event"
)

// This file owns what can be asked for, and how it is answered.

// maxBody is how much of a request's body is read, and dropped: net/http notices that a
// client goes away only once it has read the body.
const maxBody = 1 << 16

// maxWatchers is how many may read events, so that they leave connections to others.
const maxWatchers = maxConns / 2

// retryInterval is how often an upgrade that waits for its turn is tried again, if no
// event says that the time has come.
const retryInterval = time.Second

type connKey struct{}

func (s *Server) handler() http.Handler {
	watchers := make(chan struct{}, maxWatchers)
	mux := http.NewServeMux()
	mux.HandleFunc("POST /upgrade", s.upgrade)
	mux.HandleFunc("POST /rehearse", s.rehearse)
	mux.HandleFunc("POST /stop", s.stop)
	mux.HandleFunc("GET /status", s.status)
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) {
		select {
		case watchers <- struct{}{}:
			defer func() { <-watchers }()
			s.watch(w, r)
		default:
			answer(w, r, http.StatusServiceUnavailable, result{Error: fmt.Sprintf("%d others read the events already", maxWatchers)})
		}
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		_ = control.SetReadDeadline(time.Now().Add(headerTimeout))
		if r.Context().Value(connKey{}).(*conn).stranger {
			answer(w, r, http.StatusForbidden, result{Error: "only the service's user and root may ask"})
			return
		}
		if _, err := io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, maxBody)); err != nil {
			answer(w, r, http.StatusBadRequest, result{Error: "read the body of the request: " + err.Error()})
			return
		}
		_ = control.SetReadDeadline(time.Time{}) // which would end what takes longer
		mux.ServeHTTP(w, r)
	})
}

// A result is the answer to who asked for something to be done.
type result struct {
	Done  string  `json:"done,omitempty"`
	PID   int     `json:"pid,omitempty"`  // of the new process
	Took  float64 `json:"took,omitempty"` // seconds
	Error string  `json:"error,omitempty"`
}

func (r result) String() string { return r.Done + r.Error + "\n" }

func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) {
	pid, took, err := s.attempt(r, s.upg.UpgradeContext)
	if err != nil {
		answer(w, r, statusOf(err), result{Error: explain(err)})
		return
	}
	// Who has this answer and asks again must not meet this process any more.
	s.stopAccepting()
	answer(w, r, http.StatusOK, result{
		Done: fmt.Sprintf("process %d has taken over from %d after %v", pid, os.Getpid(), took),
		PID:  pid,
		Took: took.Seconds(),
	})
}

func (s *Server) rehearse(w http.ResponseWriter, r *http.Request) {
	_, took, err := s.attempt(r, s.upg.Rehearse)
	if err != nil {
		answer(w, r, statusOf(err), result{Error: explain(err)})
		return
	}
	answer(w, r, http.StatusOK, result{
		Done: fmt.Sprintf("an upgrade would succeed: the new process was ready after %v, and has left", took),
		Took: took.Seconds(),
	})
}

// attempt tries an upgrade or a rehearsal, which the client cancels by going away. A
// client that waits is not refused because another upgrade is under way, or an earlier
// generation drains. It returns the PID of the process that was put in charge.
func (s *Server) attempt(r *http.Request, try func(context.Context) error) (pid int, took time.Duration, err error) {
	events, cancel := event.Subscribe()
	defer cancel()
	ctx := r.Context()
	for {
		begin := time.Now()
		err := try(ctx)
		took := time.Since(begin).Round(time.Millisecond)
		switch {
		case !isTrue(r, "wait") || ctx.Err() != nil:
			return committedIn(events), took, err
		case errors.Is(err, tableflip.ErrParentRunning) && errors.Is(err, os.ErrDeadlineExceeded):
			// It has waited for a place in vain, and does so again.
		case errors.Is(err, tableflip.ErrParentRunning):
			_ = s.upg.WaitForParent(ctx)
		case errors.Is(err, tableflip.ErrUpgradeInProgress):
			awaitEnd(ctx, events)
		default:
			return committedIn(events), took, err
		}
	}
}

// committedIn returns which process was put in charge.
func committedIn(events <-chan event.Event) (pid int) {
	for {
		select {
		case e := <-events:
			if e.Name == event.Committed {
				pid = pidOf(e)
			}
		default:
			return pid
		}
	}
}

func pidOf(e event.Event) int {
	for _, a := range e.Attrs {
		if a.Key == "pid" {
			return int(a.Value.Int64())
		}
	}
	return 0
}

// awaitEnd waits for the end of somebody else's upgrade.
func awaitEnd(ctx context.Context, events <-chan event.Event) {
	retry := time.After(retryInterval)
	for {
		select {
		case e := <-events:
			switch e.Name {
			case event.Committed, event.Failed, event.Rehearsed:
				return
			}
		case <-retry:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (s *Server) stop(w http.ResponseWriter, r *http.Request) {
	if !s.upg.Replaced() {
		s.upg.Stop()
	}
	if s.upg.Replaced() {
		answer(w, r, statusOf(tableflip.ErrUpgraded), result{Error: explain(tableflip.ErrUpgraded)})
		return
	}
	answer(w, r, http.StatusOK, result{Done: fmt.Sprintf("process %d stops", os.Getpid())})
}

// statusOf returns the status code for how an attempt has ended.
func statusOf(err error) int {
	switch {
	case errors.Is(err, tableflip.ErrUpgradeInProgress), errors.Is(err, tableflip.ErrParentRunning),
		errors.Is(err, tableflip.ErrNotReady), errors.Is(err, tableflip.ErrUpgraded):
		return http.StatusConflict
	case errors.Is(err, tableflip.ErrStopped):
		return http.StatusServiceUnavailable
	case errors.Is(err, errors.ErrUnsupported):
		return http.StatusNotImplemented
	default:
		return http.StatusInternalServerError
	}
}

// explain says why an attempt has ended to who does not know the texts of the errors
// that upstream's users compare.
func explain(err error) string {
	switch err {
	case tableflip.ErrUpgradeInProgress:
		return "refused for now: another upgrade is under way"
	case tableflip.ErrParentRunning:
		return "refused for now: the process before this one drains"
	case tableflip.ErrNotReady:
		return "refused for now: the process is not ready yet"
	case tableflip.ErrUpgraded:
		return "refused for now: this process has just been replaced: ask the new one"
	case tableflip.ErrStopped:
		return "the service stops"
	default:
		return strings.TrimPrefix(err.Error(), "tableflip: ")
	}
}

// answer sends value to a machine, or its text to a person.
func answer(w http.ResponseWriter, r *http.Request, status int, value fmt.Stringer) {
	content, kind := []byte(value.String()), "text/plain; charset=utf-8"
	if wantsJSON(r) {
		content, kind = append(encode(value), '\n'), "application/json"
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	w.Header().Set("Content-Type", kind)
	w.WriteHeader(status)
	_, _ = w.Write(content)
}

// encode is for what can be encoded.
func encode(value any) []byte {
	content, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return content
}

func wantsJSON(r *http.Request) bool {
	return isTrue(r, "json") || strings.Contains(r.Header.Get("Accept"), "application/json")
}

// isTrue reports whether a parameter of the query is there, and not "0" or "false".
func isTrue(r *http.Request, parameter string) bool {
	values, found := r.URL.Query()[parameter]
	return found && values[0] != "0" && values[0] != "false"
}
