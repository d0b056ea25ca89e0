//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package supervise_test

import (
	"errors"
	"testing"

	"example.com/tableflip/supervise"
)

func TestUnsupported(t *testing.T) {
	if err := supervise.Self(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
}
