//go:build unix

package handovertest

import (
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
)

// These processes hold descriptors open that they do not use.

// hold starts a process that does nothing but keep fds open, and returns its PID.
func hold(fds ...int) int {
	holder := exec.Command("sleep", "1000")
	for _, fd := range fds {
		holder.ExtraFiles = append(holder.ExtraFiles, os.NewFile(uintptr(proctest.Must(unix.Dup(fd))), ""))
	}
	proctest.Must(0, holder.Start())
	return holder.Process.Pid
}

// keepPipes is hold for all pipes of this process but its standard streams.
func keepPipes() int {
	var pipes []int
	for fd := 3; fd < 1024; fd++ {
		var stat unix.Stat_t
		if unix.Fstat(fd, &stat) == nil && stat.Mode&unix.S_IFMT == unix.S_IFIFO {
			pipes = append(pipes, fd)
		}
	}
	return hold(pipes...)
}

// belongTo has cmd start a process of another user.
func belongTo(cmd *exec.Cmd, user string) {
	id := uint32(proctest.Must(strconv.Atoi(user)))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
}
