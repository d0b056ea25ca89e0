package control

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"example.com/tableflip/internal/event"
)

func TestStatusText(t *testing.T) {
	three, when := 3, time.Now()
	local := when.Format(time.DateTime)
	self := generation{PID: 7, Number: 2, State: "in charge"}
	for _, test := range []struct {
		status
		want string
	}{
		{status{generation: self, Inherits: "the arguments"}, "process 7, generation 2, is in charge\nan upgrade keeps the arguments\n"},
		{
			status{
				generation: self, Version: "v1.2.3", Revision: "0123abc", Listeners: []string{"tcp :80", "unix /run/web"},
				Others:      []generation{{PID: 6, Number: 1, State: "draining", Since: when, Connections: &three}},
				LastUpgrade: &lastUpgrade{when, 7, ""}, Inherits: "the arguments",
			},
			"process 7, generation 2, is in charge\nbuilt from v1.2.3 0123abc\nprocess 6, generation 1, is draining since " + local +
				", and has 3 connections\nlistens on tcp :80\nlistens on unix /run/web\nthe last upgrade put process 7 in charge at " + local +
				"\nan upgrade keeps the arguments\n",
		},
		{status{generation: self, Revision: "0123abc"}, "process 7, generation 2, is in charge\nbuilt from 0123abc\nan upgrade keeps \n"},
	} {
		if got := test.String(); got != test.want {
			t.Errorf("got %q, want %q", got, test.want)
		}
	}
}

func TestStatusBuild(t *testing.T) {
	before := event.Build
	defer func() { event.Build = before }()
	event.Build = func() []slog.Attr {
		return []slog.Attr{slog.String("version", "v1.2.3"), slog.String("revision", "0123abc")}
	}
	ctl, err := New(newMemoryUpgrader(), "", Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.Close()
	got := string(encode(ctl.describe()))
	for _, part := range []string{`"version":"v1.2.3"`, `"revision":"0123abc"`, `"others":[]`} {
		if !strings.Contains(got, part) {
			t.Errorf("got %s, want %s in it", got, part)
		}
	}
}
