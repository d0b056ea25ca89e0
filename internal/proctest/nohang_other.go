//go:build unix && !aix

package proctest

import "syscall"

const noHang = syscall.WNOHANG
