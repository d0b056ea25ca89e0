package nametable

import (
	"strings"
	"testing"
)

// FuzzStoreName shows that names are arbitrary bytes, and that what systemd gets is
// what sd_notify(3) allows.
func FuzzStoreName(f *testing.F) {
	f.Add("listener", "tcp", ":8080", "LISTEN")
	f.Add("", "", "", "tableflip,a,b,c")
	f.Add("packet", "unixgram", "/run/a b,c%;:\x00\xff", "tableflip,%,,")
	f.Add("a,b", "tableflip,", "%2C", "tableflip,a,b")
	f.Fuzz(func(t *testing.T, kind, network, addr, other string) {
		fdName := StoreName(Name{kind, network, addr})
		if i := strings.IndexFunc(fdName, func(r rune) bool { return r <= ' ' || r > '~' || r == ':' }); i >= 0 {
			t.Errorf("systemd refuses %q", fdName)
		}
		if n, ok := ParseStoreName(fdName); n != (Name{kind, network, addr}) || !ok {
			t.Errorf("%q, %q, %q became %q, %v", kind, network, addr, n, ok)
		}
		// Of others' names it need only survive.
		if n, ok := ParseStoreName(other); ok && !strings.HasPrefix(other, "tableflip,") {
			t.Errorf("%q was taken for %q", other, n)
		}
	})
}

func TestParseStoreNameForeign(t *testing.T) {
	for _, fdName := range []string{"", "web.socket", "other,listener,tcp,a", "tableflip,listener,tcp", "tableflip,listener,tcp,a,b", "tableflip,listener,tcp,%zz"} {
		if n, ok := ParseStoreName(fdName); ok {
			t.Errorf("%q was taken for %q", fdName, n)
		}
	}
}
