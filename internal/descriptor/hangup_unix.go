//go:build unix && !linux

package descriptor

import "golang.org/x/sys/unix"

// isAtEnd reports whether a pipe that poll(2) calls readable has nothing to read, which
// is its end. DragonFly's poll reports no POLLHUP for that (EVFILT_READ in poll_copyout,
// sys/kern/sys_generic.c). The others do: pipe_poll in sys_pipe.c of FreeBSD and NetBSD,
// ppollcollect in sys_generic.c of OpenBSD, poll_callback in sys_generic.c of macOS,
// fifo_poll in fifovnops.c of illumos. For AIX nothing is documented.
func isAtEnd(fd uintptr) bool {
	const fionread = 0x4004667f // _IOR('f', 127, int) in sys/filio.h or sys/ioctl.h of all
	n, err := unix.IoctlGetInt(int(fd), fionread)
	return n == 0 && err == nil
}
