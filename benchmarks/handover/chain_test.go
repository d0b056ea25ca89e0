//go:build linux

package handover

import (
	"os"
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
