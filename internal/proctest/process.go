//go:build unix

package proctest

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Unstartable makes the start of a command fail with os.ErrNotExist.
func Unstartable(cmd *exec.Cmd) { cmd.Path = "/nonexistent/binary" }

// Shell has a shell run script, to which the command's path is "$0".
func Shell(script string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		cmd.Args = append([]string{"sh", "-c", script, cmd.Path}, cmd.Args[1:]...)
		cmd.Path = "/bin/sh"
	}
}

// ClosedFile returns a closed file, which has no standard stream's number.
func ClosedFile() *os.File {
	file := Must(os.Open(os.DevNull))
	file.Close()
	return file
}

// Kill sends a signal to a process that must be there.
func Kill(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	OK(t, syscall.Kill(pid, sig))
}

// Terminate ends a process that waits for Terminated.
func Terminate(t *testing.T, pid int) {
	t.Helper()
	Kill(t, pid, syscall.SIGTERM)
}

// Suspend stops a process, and waits until it has stopped where the system tells that.
func Suspend(t *testing.T, pid int) {
	t.Helper()
	Kill(t, pid, syscall.SIGSTOP)
	AwaitStop(t, pid)
}

// Continue ends what Suspend began.
func Continue(t *testing.T, pid int) {
	t.Helper()
	Kill(t, pid, syscall.SIGCONT)
}

// IsReaped reports whether this process no longer has a child pid, not even a zombie.
func IsReaped(pid int) bool {
	_, err := syscall.Wait4(pid, nil, noHang, nil)
	return errors.Is(err, syscall.ECHILD)
}

// Ended reports whether a process has ended. Its status is known if it was a child of
// this process, which has then waited for it.
func Ended(pid int) (status syscall.WaitStatus, known, ended bool) {
	got, err := syscall.Wait4(pid, &status, noHang, nil)
	if got == pid {
		return status, true, true
	}
	if errors.Is(err, syscall.ECHILD) {
		// Its parent is another process, which reaps it.
		return status, false, errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
	}
	return status, false, false
}

// PIDs are processes that a test has to end. The zero value is empty, and safe for
// concurrent use.
type PIDs struct {
	mu      sync.Mutex
	started map[int]string // when
}

// Add adds a process.
func (p *PIDs) Add(pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.started == nil {
		p.started = map[int]string{}
	}
	if _, ok := p.started[pid]; !ok {
		p.started[pid] = startTime(pid)
	}
}

// Remove removes a process that has ended, whose PID another may get.
func (p *PIDs) Remove(pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.started, pid)
}

// Kill kills those that still run.
func (p *PIDs) Kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for pid, started := range p.started {
		if startTime(pid) == started {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// Limit sets a limit of this process, to the greatest possible if n is negative.
func Limit(resource, n int) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(resource, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if n >= 0 {
		assign(&limit.Cur, n)
	}
	return unix.Setrlimit(resource, &limit)
}

// assign sets a field whose type is not the same on all systems.
func assign[T int64 | uint64](field *T, n int) { *field = T(n) }

// startTime tells a process from an unrelated one that gets the same PID later. It is empty
// where it is not known, and for a process that has ended.
func startTime(pid int) string {
	fields := procStat(fmt.Sprintf("/proc/%d/stat", pid))
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}

// procStat returns the fields after the second one, which is a name in parentheses
// that may contain anything: the state, the parent and, at 19, the start time. See
// proc_pid_stat(5).
func procStat(path string) []string {
	statMu.Lock()
	defer statMu.Unlock()
	stat, _ := os.ReadFile(path)
	return strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
}

// statMu keeps the file that a goroutine of this package reads out of a test's count.
var statMu sync.Mutex

// IsZombie reports whether the first thread of a process has ended and the process was not
// waited for. Without /proc it returns false.
func IsZombie(pid int) bool {
	fields := procStat(fmt.Sprintf("/proc/%d/stat", pid))
	return len(fields) > 0 && fields[0] == "Z"
}

// WantNoChildren checks that a process has neither children nor zombies, where there
// is a /proc.
func WantNoChildren(t *testing.T, pid int) {
	t.Helper()
	if runtime.GOOS != "linux" {
		return
	}
	for _, child := range ChildrenOf(pid) {
		t.Errorf("%d has a child: %d %s", pid, child, procStat(fmt.Sprintf("/proc/%d/stat", child)))
	}
}

// ChildrenOf returns the children and zombies of a process, where there is a /proc.
func ChildrenOf(pid int) []int {
	var children []int
	for _, path := range Must(filepath.Glob("/proc/[0-9]*/stat")) {
		// One that has ended meanwhile has no fields.
		if fields := procStat(path); len(fields) > 1 && fields[1] == strconv.Itoa(pid) {
			children = append(children, Must(strconv.Atoi(filepath.Base(filepath.Dir(path)))))
		}
	}
	return children
}

// OpenDescriptors counts the descriptors of this process. A test that compares counts must
// call WithoutGC, because a garbage collection closes lost descriptors.
func OpenDescriptors() int {
	statMu.Lock()
	defer statMu.Unlock()
	open := 0
	for fd := range 1024 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			open++
		}
	}
	return open
}

// WithoutGC closes descriptors that are lost already, and keeps the garbage collector from
// running until the end of the test.
func WithoutGC(t *testing.T) {
	t.Helper()
	percent := debug.SetGCPercent(-1)
	t.Cleanup(func() { debug.SetGCPercent(percent) })

	// A collection only queues finalizers. They run in batches, one after the other, and
	// the last of a batch may be queued first: the end of a second batch is that of all
	// that the first collection has queued.
	for range 2 {
		finalized := finalizeSoon()
		runtime.GC()
		Within(t, "finalizers", finalized)
	}
}

// finalizeSoon loses an object, and returns a channel that its finalizer closes.
func finalizeSoon() <-chan struct{} {
	type object struct{ finalized chan struct{} }
	o := &object{make(chan struct{})}
	runtime.SetFinalizer(o, func(o *object) { close(o.finalized) })
	return o.finalized
}

// OpenFiles returns what the descriptors of a process refer to, by number. It is
// empty where there is no /proc.
func OpenFiles(t *testing.T, pid int) map[string]string {
	t.Helper()
	files := map[string]string{}
	if runtime.GOOS != "linux" {
		return files
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	OK(t, err)
	for _, entry := range entries {
		// The one that ReadDir used, if this is the process itself, is gone.
		if target, err := os.Readlink(filepath.Join(dir, entry.Name())); err == nil {
			files[entry.Name()] = target
		}
	}
	return files
}

// KindsOf returns how many of the OpenFiles of each kind there are.
func KindsOf(files map[string]string) map[string]int {
	kinds := map[string]int{}
	for target := range maps.Values(files) {
		kind, _, _ := strings.Cut(target, ":[")
		kinds[kind]++
	}
	return kinds
}
