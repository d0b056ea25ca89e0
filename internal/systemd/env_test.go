//go:build unix

package systemd

import (
	"slices"
	"testing"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
)

// A child lacks what was removed from its environment, and not what was set to something
// else there.
func TestEnvForChild(t *testing.T) {
	got := Env{"NOTIFY_SOCKET": "/run/notify", "INVOCATION_ID": "id"}.ForChild([]string{"NOTIFY_SOCKET=@other", "HOME=/"})
	if want := []string{"NOTIFY_SOCKET=@other", "HOME=/", "INVOCATION_ID=id"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestNameOf(t *testing.T) {
	stored := nametable.Name{Kind: nametable.Listener, Network: "tcp", Addr: ":80"}
	for _, test := range []struct {
		name   string
		socket descriptor.Socket
		fdName string
		want   nametable.Name
	}{
		{"stored", descriptor.Socket{Network: "tcp", Listening: true}, nametable.StoreName(stored), stored},
		{"another kind than was stored", descriptor.Socket{Network: "udp", Datagram: true}, nametable.StoreName(stored),
			nametable.Name{Kind: nametable.PacketConn, Network: "manager", Addr: nametable.StoreName(stored)}},
		{"connection", descriptor.Socket{Network: "tcp"}, "web", nametable.Name{Kind: nametable.Conn, Network: "manager", Addr: "web"}},
		{"raw socket", descriptor.Socket{Network: "ip"}, "ping", nametable.Name{Kind: nametable.File, Network: "ping"}},
		{"file", descriptor.Socket{}, "log", nametable.Name{Kind: nametable.File, Network: "log"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := nameOf(test.socket, test.fdName, "manager"); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}
