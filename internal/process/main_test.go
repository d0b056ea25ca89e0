//go:build unix

package process_test

import (
	"testing"

	"example.com/tableflip/internal/proctest"
)

func TestMain(m *testing.M) { proctest.Main(m) }
