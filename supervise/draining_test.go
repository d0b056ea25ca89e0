//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	clients "example.com/tableflip/internal/load"
	"example.com/tableflip/internal/proctest"
)

// Several generations drain, because of connections that are held.

// A held is what one generation serves to its end.
type held struct {
	*puppet
	exchanges []*clients.Held
}

// upgradeInARow upgrades the service as soon as the supervisor has followed the last
// upgrade. Each generation is left with something to finish. The last one of all is in
// charge.
func (b *bed) upgradeInARow(maxDraining, upgrades int) (all []*held) {
	b.t.Helper()
	cmd := supervisor(nil, "serve")
	cmd.Env = append(os.Environ(), fmt.Sprint(maxDrainingVariable, "=", maxDraining))
	b.start(cmd)
	all = append(all, &held{puppet: b.next()})
	proctest.AwaitThat(b.t, "the service is ready", func() bool { return mainPID(b.dir) == all[0].PID })
	l := startLoad(b.t, b.dir)
	for range upgrades {
		exchanges, err := clients.Hold(filepath.Join(b.dir, "socket"), 10)
		proctest.OK(b.t, err)
		b.t.Cleanup(func() { clients.EndAll(exchanges) })
		for _, e := range exchanges {
			// Who was replaced may accept until it notices.
			i := slices.IndexFunc(all, func(h *held) bool { return h.PID == e.By })
			if i < 0 {
				b.t.Fatalf("process %d serves, and %d is in charge", e.By, all[len(all)-1].PID)
			}
			all[i].exchanges = append(all[i].exchanges, e)
		}
		b.signal(syscall.SIGHUP)
		next := &held{puppet: b.next()}
		b.log.Await(fmt.Sprintf("new main process\" pid=%d ", next.PID))
		all = append(all, next)
	}
	l.stop()
	return all
}

// wantFinished checks that all is finished, or has been cut.
func (h *held) wantFinished(isCut bool) {
	h.t.Helper()
	if isCut {
		h.AwaitEnd()
	}
	for _, e := range h.exchanges {
		if err := e.Finish(); (err != nil) != isCut {
			h.t.Errorf("process %d: %v", h.PID, err)
		}
	}
	h.AwaitEnd()
}

func TestManyUpgradesInARow(t *testing.T) {
	const upgrades = 10
	for _, test := range []struct {
		maxDraining int
		cut         int // generations, the oldest
	}{
		{maxDraining: upgrades},
		{maxDraining: 2, cut: upgrades - 3},
	} {
		t.Run(fmt.Sprint("at most ", test.maxDraining), func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			all := b.upgradeInARow(test.maxDraining, upgrades)
			for i, h := range all[:upgrades] {
				h.wantFinished(i < test.cut)
			}
			b.signal(syscall.SIGTERM)
			b.wantStatus(0)
		})
	}
}

// The supervisor ends, and with it the service, if the process in charge dies. Those that
// drain have a second.
func TestKilledWhileManyDrain(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	all := b.upgradeInARow(2, 2)
	proctest.Kill(t, all[2].PID, syscall.SIGKILL)
	for _, h := range all[:2] {
		h.wantFinished(true)
	}
	b.wantStatus(128 + int(syscall.SIGKILL))
}

// The end of one that drains is nothing to the supervisor.
func TestMiddleKilledWhileManyDrain(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	all := b.upgradeInARow(3, 3)
	proctest.Kill(t, all[1].PID, syscall.SIGKILL)
	all[1].wantFinished(true)
	all[0].wantFinished(false)
	all[2].wantFinished(false)
	b.signal(syscall.SIGTERM)
	b.wantStatus(0)
}
