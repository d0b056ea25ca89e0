//go:build linux

package handover

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

// TestChain shows that what is measured works: that the listener and the socket
// of the first generation are served by the third.
func TestChain(t *testing.T) {
	for _, c := range Contenders {
		t.Run(string(c), func(t *testing.T) {
			ch := start(t, c, 4)
			first := ch.Serving
			for range 2 {
				upgrade(t, ch)
			}
			if !ch.Serving.Inherited || ch.Serving.PID == first.PID {
				t.Errorf("got process %+v after %+v, want a child", ch.Serving, first)
			}
			if ch.Serving.TCP != first.TCP || ch.Serving.UDP != first.UDP {
				t.Errorf("got the addresses of %+v, want those of %+v", ch.Serving, first)
			}
			if err := Greeted(first.TCP); err != nil {
				t.Error(err)
			}
			if err := exchange(first.UDP, 1); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFloorWaitsForParent shows that what the floor's child waits for is the end of its
// parent, and nothing that the garbage collector may end before: the parent has answered
// when the child serves. So many listeners make the collector run during Upgrade.
func TestFloorWaitsForParent(t *testing.T) {
	most, err := MostListeners()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GOGC", "1")
	ch := start(t, Floor, min(4000, most))
	for range 30 {
		if err := ch.command(commandUpgrade); err != nil {
			t.Fatal(err)
		}
		first, err := ch.answers.ReadString('\n')
		if err != nil || !strings.HasPrefix(first, "upgraded ") {
			t.Fatalf("got %q (%v) first, want the parent's answer", first, err)
		}
		if err := ch.awaitServing(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAnswersInAnyOrder shows that nothing depends on which of two processes is the
// first to write.
func TestAnswersInAnyOrder(t *testing.T) {
	output, answers, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	fmt.Fprintf(answers, servingFormat+upgradedFormat+servingFormat, 2, true, "a", "b", 1, 2, 3, 4, 5, 3, true, "c", "d", 6, 7)
	answers.Close()
	ch := &Chain{output: output, answers: bufio.NewReader(output)}
	var called, committed, returned int64
	if err := ch.answer(upgradedFormat, &called, &committed, &returned); err != nil || called != 3 || returned != 5 {
		t.Errorf("got %d, %d, %v; want 3, 5", called, returned, err)
	}
	for want := 2; want <= 3; want++ {
		if err := ch.awaitServing(); err != nil || ch.Serving.PID != want {
			t.Errorf("got process %d, %v; want %d", ch.Serving.PID, err, want)
		}
	}
}

// TestUpgradeInARow shows that the time is one of as many upgrades as it says.
func TestUpgradeInARow(t *testing.T) {
	for _, c := range Contenders {
		t.Run(string(c), func(t *testing.T) {
			ch := start(t, c, 2)
			pids := map[int]bool{ch.Serving.PID: true}
			begin := time.Now()
			took, err := ch.UpgradeInARow(3)
			if err != nil {
				t.Fatal(err)
			}
			if took <= 0 || took > time.Since(begin) {
				t.Errorf("three upgrades took %v, want something in %v", took, time.Since(begin))
			}
			if pids[ch.Serving.PID] || !ch.Serving.Inherited {
				t.Errorf("%+v is in charge, want a child", ch.Serving)
			}
			// The chain goes on where it ended.
			if _, err := ch.Upgrade(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDraining shows that as many generations drain as kept connections hold, each of which
// its own process answers, and that they exit when the connections end.
func TestDraining(t *testing.T) {
	const draining = 3
	ch, err := StartDraining(os.Args[0], draining)
	if err != nil {
		t.Fatal(err)
	}
	var connections []*Kept
	for range draining + 1 {
		conn, err := ch.Keep()
		if err != nil {
			t.Fatal(err)
		}
		connections = append(connections, conn)
		upgrade(t, ch)
	}
	for _, conn := range connections {
		if err := conn.Ask(); err != nil {
			t.Error(err)
		}
		conn.Close()
	}
	if err := ch.Close(); err != nil {
		t.Error(err)
	}
}

func start(tb testing.TB, c Contender, n int) *Chain {
	tb.Helper()
	ch, err := Start(os.Args[0], c, n)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := ch.Close(); err != nil {
			tb.Error(err)
		}
	})
	return ch
}

// upgrade returns what the call of Upgrade took.
func upgrade(tb testing.TB, ch *Chain) time.Duration {
	tb.Helper()
	timing, err := ch.Upgrade()
	if err != nil {
		tb.Fatal(err)
	}
	return timing.Call
}
