package nametable

import (
	"net/url"
	"strings"
)

// storePrefix begins the FDNames of the sockets that this package had the service
// manager store. The manager's own sockets have other names.
const storePrefix = "tableflip,"

// StoreName returns the FDName under which the service manager stores a socket.
// sd_notify(3) allows 255 printable ASCII characters except colons.
func StoreName(n Name) string {
	var text strings.Builder
	text.WriteString(storePrefix)
	writeEscaped(&text, n.Kind)
	text.WriteByte(',')
	writeEscaped(&text, n.Network)
	text.WriteByte(',')
	writeEscaped(&text, n.Addr)
	return strings.ReplaceAll(text.String(), ":", "%3A")
}

// ParseStoreName is the inverse of StoreName.
func ParseStoreName(fdName string) (n Name, ok bool) {
	fields := strings.Split(fdName, ",")
	if len(fields) != 4 || !IsStoreName(fdName) {
		return Name{}, false
	}
	for i, field := range fields {
		var err error
		if fields[i], err = url.PathUnescape(field); err != nil {
			return Name{}, false
		}
	}
	return Name{fields[1], fields[2], fields[3]}, true
}

// IsStoreName reports whether fdName is of the form that StoreName returns.
func IsStoreName(fdName string) bool { return strings.HasPrefix(fdName, storePrefix) }
