package systemdtest

import (
	"fmt"
	"slices"
	"strconv"
	"syscall"
	"testing"

	clients "example.com/tableflip/internal/load"
	"example.com/tableflip/internal/proctest"
)

// This file owns services of which several generations drain (Options.MaxDraining),
// because of connections that are held.

// A generation of such a service.
type generation struct {
	pid  int
	held []*clients.Held // what it has begun
}

// Ten reloads in a row, each as soon as systemd knows of the last, under load, while
// each generation has connections that last.
func TestManyReloadsInARow(t *testing.T) {
	const reloads = 10
	for _, test := range []struct {
		maxDraining int
		cut         int // generations, the oldest
	}{
		{maxDraining: reloads},
		{maxDraining: 2, cut: reloads - 3},
	} {
		t.Run(fmt.Sprint("AtMost", test.maxDraining), func(t *testing.T) {
			onMachine(t, func(t *testing.T) {
				s := newDrainingService(t, notify, test.maxDraining)
				s.phase("Start", tolerance{}, s.start)
				s.load = startLoad(t)
				s.phase("Reload", tolerance{}, func() {
					all := s.reloadInARow(reloads)
					for i, g := range all {
						g.wantFinished(s.t, i < test.cut)
					}
					s.expectRunning()
				})
				s.load.end()
				s.load = nil
				s.phase("Stop", tolerance{}, s.stop)
			})
		})
	}
}

// The death of one that drains is nothing to the others, and that of the process in charge
// has all end soon, so that systemd can start the service again.
func TestKilledWhileManyDrain(t *testing.T) {
	onMachine(t, func(t *testing.T) {
		s := newDrainingService(t, notify, 3)
		s.phase("Start", tolerance{}, s.start)
		s.phase("Middle", tolerance{}, func() {
			restarts := s.show()["NRestarts"]
			all := s.reloadInARow(3)
			proctest.Kill(s.t, all[1].pid, syscall.SIGKILL)
			all[1].wantFinished(s.t, true)
			all[0].wantFinished(s.t, false)
			all[2].wantFinished(s.t, false)
			s.expectRunning()
			s.expect(map[string]string{"NRestarts": restarts})
		})
		s.phase("Newest", tolerance{warnings: exited}, func() {
			all := s.reloadInARow(2)
			s.kill()
			for _, g := range all {
				g.wantFinished(s.t, true)
			}
			s.expectRunning()
		})
		s.phase("Stop", tolerance{}, s.stop)
	})
}

// systemd reads the PID file after a reload, when the upgrade may not have ended, and when
// the main process ends. So it reloads a process that was replaced, which passes that on.
func TestManyReloadsPIDFile(t *testing.T) {
	onMachine(t, func(t *testing.T) {
		s := newDrainingService(t, pidFile, 5)
		s.phase("Start", tolerance{}, s.start)
		s.phase("Reload", tolerance{}, func() {
			for _, g := range s.reloadInARow(5) {
				g.wantFinished(s.t, false)
			}
			s.await("MainPID", equal(strconv.Itoa(s.main)))
			s.expectRunning()
		})
		s.phase("Stop", tolerance{}, s.stop)
	})
}

func newDrainingService(t *testing.T, k kind, maxDraining int) *service {
	s := newService(t, k)
	command := installed + " -max-draining " + strconv.Itoa(maxDraining)
	if !k.notifies {
		command += " -pid-file /run/web.pid"
	}
	s.change("ExecStart=", "ExecStart="+command)
	return s
}

// reloadInARow reloads the service n times, and leaves each generation, except the last,
// with connections. It returns those.
func (s *service) reloadInARow(n int) (all []*generation) {
	s.t.Helper()
	all = append(all, &generation{pid: s.main})
	for range n {
		held, err := clients.Hold(unixPath, 10)
		proctest.OK(s.t, err)
		s.t.Cleanup(func() { clients.EndAll(held) })
		for _, h := range held {
			// Who was replaced may accept until it notices.
			i := slices.IndexFunc(all, func(g *generation) bool { return g.pid == h.By })
			if i < 0 {
				s.t.Fatalf("process %d serves, and %d is in charge", h.By, s.main)
			}
			all[i].held = append(all[i].held, h)
		}
		s.version = s.install("good")
		old := strconv.Itoa(s.main)
		s.systemctl("reload", s.service)
		if s.notifies {
			s.await("MainPID", func(pid string) bool { return pid != old })
			s.adopt()
		} else {
			s.askMain()
		}
		all = append(all, &generation{pid: s.main})
	}
	s.askMain()
	return all[:n]
}

// wantFinished checks that all is finished, or has been cut.
func (g *generation) wantFinished(t *testing.T, isCut bool) {
	t.Helper()
	if isCut {
		proctest.AwaitThat(t, "a process that hurries has ended", func() bool { return !isRunning(g.pid) })
	}
	for _, h := range g.held {
		if err := h.Finish(); (err != nil) != isCut {
			t.Errorf("process %d: %v", g.pid, err)
		}
	}
}
