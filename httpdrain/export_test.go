package httpdrain

import (
	"net"
	"time"
)

// SetAcceptLimits sets for how long d empties a queue, and waits for the server to ask
// for a connection.
func SetAcceptLimits(d *Drainer, limit time.Duration) {
	d.limits.accept, d.limits.server = limit, limit
}

// SetLinger has d prepare to keep sockets open as soon as it can, and close them when their
// clients have been silent for long.
func SetLinger(d *Drainer, silence time.Duration) {
	d.limits.lingerAfter, d.limits.lingerSilence = 0, silence
}

// SetLastTransfer has d ask a connection, and not the kernel, when something was received
// and sent last, and believe that nothing waits to be read.
func SetLastTransfer(d *Drainer) {
	d.isReadable = func(any) (readable, known bool) { return false, true }
	d.lastTransfer = func(nc net.Conn, _ time.Time) (received, sent time.Time, ok bool) {
		t, ok := bare(nc).(interface {
			LastTransfer() (received, sent time.Time)
		})
		if !ok {
			return time.Time{}, time.Time{}, false
		}
		received, sent = t.LastTransfer()
		return received, sent, true
	}
}
