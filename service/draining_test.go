//go:build unix

package service_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/proctest"
)

// Deploys in quick succession, each as soon as the last one is done, while long-lived
// connections keep the generations before.

func TestManyUpgradesInARow(t *testing.T) {
	const upgrades, each = 10, 10 // of both kinds of connections, by each generation
	for _, test := range []struct {
		maxDraining int
		cut         int // generations, the oldest
	}{
		{maxDraining: upgrades},
		{maxDraining: 2, cut: upgrades - 3},
	} {
		t.Run(fmt.Sprint("at most ", test.maxDraining), func(t *testing.T) {
			t.Parallel()
			directory := proctest.SocketDir(t)
			s, current := startService(t, directory, nil, fmt.Sprint(maxDrainingVariable, "=", test.maxDraining))
			_, end := startClients(t, directory)
			var all []*load.Held
			t.Cleanup(func() { load.EndAll(all) })
			generations := []*proctest.Process{current}
			for range upgrades {
				held, err := load.Hold(filepath.Join(directory, "socket"), each)
				proctest.OK(t, err)
				all = append(all, held...)
				wantAnswer(t, ask(t.Context(), filepath.Join(directory, "ctl"), "upgrade"), http.StatusOK, "has taken over")
				generations = append(generations, s.Next())
			}
			end()
			if pid := pidIn(directory); pid != generations[upgrades].PID {
				t.Errorf("process %d is in charge, want %d", pid, generations[upgrades].PID)
			}
			for i, h := range all {
				// Who was replaced may accept until it notices.
				inCharge := i / (2 * each)
				by := slices.IndexFunc(generations, func(p *proctest.Process) bool { return p.PID == h.By })
				if by < 0 || by > inCharge {
					t.Errorf("process %d serves, and %d was in charge", h.By, generations[inCharge].PID)
				}
				if err := h.Finish(); (err != nil) != (by < test.cut) {
					t.Errorf("generation %d: %v", by+1, err)
				}
			}
			for _, g := range generations[:upgrades] {
				g.AwaitEnd()
			}
			toldOfCut := func() bool {
				conn := proctest.Opened[net.Conn](t)(net.Dial("unix", filepath.Join(directory, "ctl")))
				io.WriteString(conn, "GET /status?json HTTP/1.0\r\n\r\n")
				return !strings.Contains(proctest.Answers(t, []net.Conn{conn})[0], `"connectionsCut":0}`)
			}
			if test.cut > 0 {
				proctest.AwaitThat(t, "the status tells what was cut", toldOfCut)
			} else if toldOfCut() {
				t.Error("the status tells that something was cut")
			}
			proctest.Terminate(t, generations[upgrades].PID)
			generations[upgrades].AwaitEnd()
		})
	}
}
