//go:build unix

package descriptor

import (
	"net"
	"testing"
)

func TestZone(t *testing.T) {
	links, err := net.Interfaces()
	if err != nil || len(links) == 0 {
		t.Skip("no interfaces: ", err)
	}
	for index, want := range map[uint32]string{0: "", uint32(links[0].Index): links[0].Name, 2147483647: "2147483647"} {
		if got := zone(index); got != want {
			t.Errorf("%d: got %q, want %q", index, got, want)
		}
	}
}
