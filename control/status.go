package control

import (
	"fmt"
	"net/http"
	"os"
	"runtime"
	"strings"
	"time"

	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/registry"
)

// This file owns the answer to "who serves, and since when?".

// inherits is what an upgrade would not apply: see the package documentation of
// tableflip.
const inherits = "the arguments, environment, limits, user and control group of the process: what has changed of these, in a unit for example, is applied by a restart only"

// A status is what a process knows of the service.
type status struct {
	generation
	Version     string       `json:"version,omitempty"`  // of the program's main module
	Revision    string       `json:"revision,omitempty"` // the commit that it was built from
	Go          string       `json:"go"`
	Listeners   []string     `json:"listeners"` // that an upgrade passes on
	Others      []generation `json:"others"`    // that live, oldest first
	LastUpgrade *lastUpgrade `json:"lastUpgrade,omitempty"`
	Counters    Counters     `json:"counters"`
	Inherits    string       `json:"inherits"` // what an upgrade does not apply
}

// A generation is one process of the service.
type generation struct {
	PID         int       `json:"pid"`
	Number      int       `json:"generation"`
	State       string    `json:"state"`
	Since       time.Time `json:"since,omitzero"`
	Connections *int      `json:"connections,omitempty"` // nil if that is not known
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) {
	answer(w, r, http.StatusOK, s.describe())
}

func (s *Server) describe() status {
	m := s.history.recall()
	st := status{
		Go:          runtime.Version(),
		Listeners:   registry.Listeners(),
		LastUpgrade: m.last,
		Counters:    m.counters,
		Inherits:    inherits,
	}
	for _, a := range event.Build() {
		switch a.Key {
		case "version":
			st.Version = a.Value.String()
		case "revision":
			st.Revision = a.Value.String()
		}
	}
	st.generation, st.Others = s.generations()
	return st
}

// generations returns this process, and the others that live.
func (s *Server) generations() (self generation, others []generation) {
	others = []generation{}
	for _, g := range s.upg.Generations() {
		described := generation{PID: g.PID, Number: g.Number, State: g.State, Since: g.Since}
		if g.PID != os.Getpid() {
			described.Connections = s.connectionsOf(g.PID)
			others = append(others, described)
			continue
		}
		self = described
		if s.opts.Connections != nil {
			n := s.opts.Connections()
			self.Connections = &n
		}
	}
	return self, others
}

func (st status) String() string {
	var text strings.Builder
	line := func(format string, arguments ...any) { fmt.Fprintf(&text, format+"\n", arguments...) }
	line("%v", st.generation)
	if st.Version+st.Revision != "" {
		line("built from %s", strings.TrimSpace(st.Version+" "+st.Revision))
	}
	for _, g := range st.Others {
		line("%v", g)
	}
	for _, name := range st.Listeners {
		line("listens on %s", name)
	}
	if st.LastUpgrade != nil {
		line("the last upgrade %v", st.LastUpgrade)
	}
	line("an upgrade keeps %s", st.Inherits)
	return text.String()
}

func (g generation) String() string {
	text := fmt.Sprintf("process %d, generation %d, is %s", g.PID, g.Number, g.State)
	if !g.Since.IsZero() {
		text += fmt.Sprintf(" since %s", g.Since.Local().Format(time.DateTime))
	}
	if g.Connections != nil {
		text += fmt.Sprintf(", and has %d connections", *g.Connections)
	}
	return text
}
