package tableflip

import (
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/systemd"
)

// How long a service manager may keep this process waiting.
var (
	NotifyTimeout  = &systemd.NotifyTimeout
	BarrierTimeout = &systemd.BarrierTimeout
)

// StoreName and ParseStoreName are each other's inverse.
func StoreName(kind, network, addr string) string {
	return nametable.StoreName(nametable.Name{Kind: kind, Network: network, Addr: addr})
}

func ParseStoreName(fdName string) (kind, network, addr string, ok bool) {
	n, ok := nametable.ParseStoreName(fdName)
	return n.Kind, n.Network, n.Addr, ok
}
