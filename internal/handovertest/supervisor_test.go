//go:build unix

package handovertest

import (
	"fmt"
	"maps"
	"os"
	"strings"
	"testing"

	"example.com/tableflip/internal/proctest"
)

// A supervisor that can't be told of the new process ends the service with the old one.
func TestSupervisorUntold(t *testing.T) {
	t.Parallel()
	for _, socket := range []string{"", "/nonexistent/notify"} {
		t.Run(fmt.Sprintf("%q", socket), func(t *testing.T) {
			t.Parallel()
			c := newChain(t)
			g, _ := c.start(fmt.Sprint("TABLEFLIP_SUPERVISOR=", os.Getpid()), "NOTIFY_SOCKET="+socket)
			g.AwaitStep(alone)
			before := proctest.OpenFiles(t, g.PID)
			g.Order("upgrade")
			c.Next()
			if n := g.Await("upgraded"); !strings.Contains(n.Text, fmt.Sprint("the supervisor, ", os.Getpid())) {
				t.Errorf("Upgrade returned %q", n.Text)
			}
			if after := proctest.OpenFiles(t, g.PID); !maps.Equal(after, before) {
				t.Errorf("the descriptors were %v, and are %v", before, after)
			}
			c.wantCharge(g.PID)
			c.wantStop(g)
		})
	}
}

// A supervisor that is no ancestor has started another service, whose environment leaked.
func TestSupervisorOfAnother(t *testing.T) {
	t.Parallel()
	c := newChain(t)
	g, _ := c.start("TABLEFLIP_SUPERVISOR=999999999", "NOTIFY_SOCKET=")
	g.AwaitStep(alone)
	g = c.upgrade(g)
	c.wantCharge(g.PID)
	c.wantStop(g)
}
