package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"example.com/tableflip/internal/event"
)

// This file owns the stream of events, and what one looks like.

// watching is the first event of a stream: whose it is.
const watching = "watching"

// A step is an event as it is sent: an object with these fields and attributes.
type step struct {
	time  time.Time
	name  string
	attrs map[string]any
}

// watch streams the events of this process until it ends. A client that does not read
// misses events, and is cut in the end.
func (s *Server) watch(w http.ResponseWriter, r *http.Request) {
	events, cancel := event.Subscribe()
	defer cancel()
	kind := "text/plain; charset=utf-8"
	if wantsJSON(r) {
		kind = "application/x-ndjson"
	}
	w.Header().Set("Content-Type", kind)

	self, _ := s.generations()
	first := event.Event{Time: time.Now(), Name: watching, Attrs: []slog.Attr{
		slog.Int("pid", self.PID), slog.Int("generation", self.Number), slog.String("state", self.State)}}
	if sendStep(w, r, first) != nil {
		return
	}
	for {
		select {
		case e := <-events:
			if sendStep(w, r, e) != nil {
				return
			}
		case <-r.Context().Done():
			return
		case <-s.closing:
			cancel() // closes events
			for e := range events {
				if sendStep(w, r, e) != nil {
					return
				}
			}
			return
		}
	}
}

func sendStep(w http.ResponseWriter, r *http.Request, e event.Event) error {
	line := []byte(stepOf(e).String())
	if wantsJSON(r) {
		line = encode(stepOf(e))
	}
	control := http.NewResponseController(w)
	_ = control.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := w.Write(append(line, '\n')); err != nil {
		return err
	}
	return control.Flush()
}

func stepOf(e event.Event) step {
	s := step{e.Time, e.Name, map[string]any{}}
	for _, a := range e.Attrs {
		switch value := a.Value.Resolve(); value.Kind() {
		case slog.KindDuration:
			s.attrs[a.Key] = value.Duration().Round(time.Microsecond).Seconds()
		case slog.KindInt64, slog.KindUint64, slog.KindBool:
			s.attrs[a.Key] = value.Any()
		default:
			s.attrs[a.Key] = value.String()
		}
	}
	if s.attrs["pid"] == nil {
		s.attrs["pid"] = int64(os.Getpid())
	}
	return s
}

// MarshalJSON returns one object with the time, the event and its attributes.
func (s step) MarshalJSON() ([]byte, error) {
	fields := maps.Clone(s.attrs)
	fields["time"], fields["event"] = s.time, s.name
	return json.Marshal(fields)
}

func (s *step) UnmarshalJSON(text []byte) error {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber() // a float64 is not written as it was read
	if err := decoder.Decode(&s.attrs); err != nil {
		return err
	}
	when, _ := s.attrs["time"].(string)
	name, ok := s.attrs["event"].(string)
	if !ok {
		return errors.New("it is no event")
	}
	s.name = name
	delete(s.attrs, "time")
	delete(s.attrs, "event")
	var err error
	s.time, err = time.Parse(time.RFC3339, when)
	return err
}

// String returns a line for a person.
func (s step) String() string {
	var line strings.Builder
	fmt.Fprintf(&line, "%s %s", s.time.Local().Format("2006-01-02 15:04:05.000"), s.name)
	for _, key := range slices.Sorted(maps.Keys(s.attrs)) {
		value := fmt.Sprint(s.attrs[key])
		if strings.ContainsAny(value, " \t\n\"=") {
			value = fmt.Sprintf("%q", value)
		}
		fmt.Fprintf(&line, " %s=%s", key, value)
	}
	return line.String()
}
