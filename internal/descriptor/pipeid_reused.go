//go:build unix && !freebsd && !linux && !solaris

package descriptor

// UniquePipes reports whether no pipe has the device and the inode of an earlier one.
// On macOS the inode is a hash of the pipe's address in the kernel, which "may be
// recycled relatively quickly"; OpenBSD, NetBSD and DragonFly report zeros for all
// pipes (pipe_stat in sys_pipe.c of each). For AIX nothing is documented.
var UniquePipes = false
