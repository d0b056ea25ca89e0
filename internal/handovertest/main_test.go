//go:build unix

package handovertest

import (
	"testing"

	"example.com/tableflip/internal/proctest"
)

func TestMain(m *testing.M) { proctest.Main(m) }
