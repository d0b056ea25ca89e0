package supervise

import (
	"bytes"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// setReaper makes this process, or not, the parent of its descendants' orphans.
func setReaper(on bool) error {
	var value uintptr
	if on {
		value = 1
	}
	return os.NewSyscallError("prctl PR_SET_CHILD_SUBREAPER", unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, value, 0, 0, 0))
}

// bindNotifySocket binds to an abstract address that the kernel chooses, so that no
// directory must be writable. Anyone can write to it: the kernel tells who does.
func bindNotifySocket(fd int) (address string, remove func(), err error) {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return "", nil, os.NewSyscallError("setsockopt SO_PASSCRED", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{}); err != nil {
		return "", nil, os.NewSyscallError("bind", err)
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		return "", nil, os.NewSyscallError("getsockname", err)
	}
	return bound.(*unix.SockaddrUnix).Name, func() {}, nil
}

func credentials(part *unix.SocketControlMessage) (pid, uid int) {
	sender, err := unix.ParseUnixCredentials(part)
	if err != nil {
		return 0, 0
	}
	return int(sender.Pid), int(sender.Uid)
}

// procMounted reports whether /proc is that of this PID namespace.
func procMounted() bool {
	self, err := os.Readlink("/proc/self")
	return err == nil && self == strconv.Itoa(os.Getpid())
}

// parentOf returns 0 if there is no such process, or it has no parent here.
func parentOf(pid int) int {
	stat, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	// The second field is a name in parentheses, which may contain anything; the
	// fourth is the parent (proc_pid_stat(5)).
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	parent, _ := strconv.Atoi(fields[1])
	return parent
}

func descends(pid, ancestor int) bool {
	for pid = parentOf(pid); pid > 0; pid = parentOf(pid) {
		if pid == ancestor {
			return true
		}
	}
	return false
}

// isDescendant reports whether pid is a process that this one, or one of its
// descendants, has started. Without /proc it believes that.
func isDescendant(pid int) bool {
	if !procMounted() {
		return unix.Kill(pid, 0) == nil
	}
	return descends(pid, os.Getpid())
}

func isAncestor(pid int) bool {
	if !procMounted() {
		return unix.Kill(pid, 0) == nil
	}
	return descends(os.Getpid(), pid)
}

// descendants returns all processes that descend from this one, if /proc tells.
func descendants() (pids []int, known bool) {
	if !procMounted() {
		return nil, false
	}
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, false
	}
	defer proc.Close()
	names, _ := proc.Readdirnames(-1)
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && descends(pid, os.Getpid()) {
			pids = append(pids, pid)
		}
	}
	return pids, true
}

// A watch tells of the end of a process that others may wait for. Nil never does.
type watch struct {
	pidfd *os.File
	done  chan struct{}
}

func watchProcess(pid int) (*watch, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	w := &watch{pidfd: os.NewFile(uintptr(fd), "pidfd"), done: make(chan struct{})}
	go func() {
		if awaitReadable(w.pidfd) == nil {
			close(w.done)
		}
	}()
	return w, nil
}

func (w *watch) ended() <-chan struct{} {
	if w == nil {
		return nil
	}
	return w.done
}

// status returns what the process ended with, or nil if this kernel does not tell:
// before Linux 6.15 only the parent learns it.
func (w *watch) status() *unix.WaitStatus {
	if w == nil {
		return nil
	}
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	raw, err := w.pidfd.SyscallConn()
	if err != nil {
		return nil
	}
	_ = raw.Control(func(fd uintptr) { err = unix.IoctlPidfdInfo(int(fd), &info) })
	if err != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return nil
	}
	status := unix.WaitStatus(info.Exit_code)
	return &status
}

func (w *watch) close() {
	if w != nil {
		w.pidfd.Close()
	}
}
