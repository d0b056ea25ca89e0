//go:build freebsd || linux || solaris

package descriptor

// UniquePipes reports whether no pipe has the device and the inode of an earlier one:
// the inode comes from a counter (pipe_stat in sys_pipe.c of FreeBSD, fifogetid in
// fifosubr.c of illumos, get_next_ino in fs/inode.c of Linux). Tests change it.
var UniquePipes = true
