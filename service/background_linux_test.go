package service_test

import (
	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
)

func init() {
	openSlowToClose = func() {
		// To close one, the kernel waits until nobody in it can use its marks any more.
		for range 4 {
			fd := proctest.Must(unix.InotifyInit1(unix.IN_CLOEXEC))
			proctest.Must(unix.InotifyAddWatch(fd, "/", unix.IN_DELETE_SELF))
		}
	}
}
