package tableflip

// How long a service manager may keep this process waiting.
var (
	NotifyTimeout  = &notifyTimeout
	BarrierTimeout = &barrierTimeout
)

// StoreName and ParseStoreName are each other's inverse.
func StoreName(kind, network, addr string) string {
	return storeName(name{kind, network, addr})
}

func ParseStoreName(fdName string) (kind, network, addr string, ok bool) {
	n, ok := parseStoreName(fdName)
	return n.kind, n.network, n.addr, ok
}
