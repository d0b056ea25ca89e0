package supervise

import (
	"bytes"
	"cmp"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// setReaper sets whether this process becomes the parent of its descendants' orphans.
func setReaper(on bool) error {
	var value uintptr
	if on {
		value = 1
	}
	return os.NewSyscallError("prctl PR_SET_CHILD_SUBREAPER", unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, value, 0, 0, 0))
}

// tellsSender: the kernel tells who has sent a message.
const tellsSender = true

// bindNotifySocket binds to an abstract address that the kernel chooses, so that no
// directory must be writable, and the service can change its user. Anyone in the
// network namespace can write to it, but the kernel names the sender.
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

// credentials returns the PID as this PID namespace has it, which is 0 for a process
// of another that is not below this one.
func credentials(part *unix.SocketControlMessage) (pid int) {
	sender, err := unix.ParseUnixCredentials(part)
	if err != nil {
		return 0
	}
	return int(sender.Pid)
}

// procMounted reports whether /proc is that of this PID namespace.
func procMounted() bool {
	self, err := os.Readlink("/proc/self")
	return err == nil && self == strconv.Itoa(os.Getpid())
}

// A stat is what proc_pid_stat(5) says of a process. It is zero if there is none.
type stat struct {
	zombie  bool
	parent  int    // 0 if it has none here
	started uint64 // in ticks since the boot
}

func statOf(pid int) (s stat) {
	content, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	// The second field is a name in parentheses, which may contain anything.
	fields := strings.Fields(string(content[bytes.LastIndexByte(content, ')')+1:]))
	if len(fields) < 20 {
		return s
	}
	s.zombie = fields[0] == "Z" && fields[17] == "1" // else just its first thread has ended
	s.parent, _ = strconv.Atoi(fields[1])
	s.started, _ = strconv.ParseUint(fields[19], 10, 64)
	return s
}

func descends(pid, ancestor int) bool {
	for pid = statOf(pid).parent; pid > 0; pid = statOf(pid).parent {
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

// descendants returns all processes that descend from this one and live, if /proc
// tells.
func descendants() (pids []int, known bool) {
	if !procMounted() {
		return nil, false
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, false
	}
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil && descends(pid, os.Getpid()) && !statOf(pid).zombie {
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

// signal does not rely on the process's number, which may be another's by now.
func (w *watch) signal(sig unix.Signal) error {
	raw, err := w.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	return cmp.Or(controlErr, err)
}

// signalDescendant signals a process if it is the service's.
func signalDescendant(pid int, sig unix.Signal) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ENOSYS || err == unix.EPERM { // before Linux 5.3, or seccomp
		return unix.Kill(pid, sig)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !isDescendant(pid) { // by now
		return unix.ESRCH
	}
	return unix.PidfdSendSignal(fd, sig, nil, 0)
}

// ownProgram is this program, also when another has taken its place.
func ownProgram() (string, error) { return "/proc/self/exe", nil }

// status returns the exit status of the process, or nil if this kernel does not tell it:
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
