// Package supervise keeps a process in place while the generations of a service come
// and go. Containers need it because they end with the process that they started.
// Supervisors and shells need it because they watch no other process. The command
// tableflip-supervise runs any program under such a process. A program that calls [Self]
// runs itself under one.
//
// # What it follows
//
// The supervisor acts like systemd with Type=notify: it offers NOTIFY_SOCKET, and
// learns from MAINPID which process is the main process (sd_notify(3)). Package
// tableflip sends MAINPID without any code in the service. While the main process lives,
// only its messages count, which is systemd's default, too: a start script must exec the
// server. Messages from processes that are not the service's are ignored. On Linux the
// kernel names the sender. On other systems only processes of the same user can write.
//
// The supervisor forwards HUP, TERM, INT, QUIT, USR1, USR2, WINCH, CONT and TSTP to the
// main process. If the main process has died during an upgrade, and its child may be
// about to take over, signals wait for the child. The child also gets the signals that
// the old process got during the upgrade, because the old process may have died before
// it obeyed them. TERM, INT and QUIT that reached the old process during an upgrade also
// go to the new one once the upgrade has succeeded, because the old process no longer
// stops the service.
//
// If the supervisor has a NOTIFY_SOCKET itself, it passes READY, RELOADING, STOPPING,
// STATUS and the watchdog's messages on, with itself as the main process. Sockets that
// it inherits by LISTEN_FDS go to the service, with the service's PID in LISTEN_PID. For
// that, the program that calls Run is started again, and executes the service from an
// init function of this package. Descriptors that the service sends with FDSTORE are
// closed.
//
// Neither the log nor the outer NOTIFY_SOCKET can block the supervisor. If the log is
// not read in time, records are dropped, and the log says how many are missing. If the
// outer NOTIFY_SOCKET is not read in time, the last messages are kept.
//
// # How it ends
//
// The supervisor ends once the main process has ended, no other process takes over, and
// no process of the service is left that it waits for:
//
//   - The main process was told to stop by TERM, INT or QUIT, or said STOPPING. Older
//     generations may finish their drain. All other processes of the service get
//     SIGTERM. Whatever is left after Supervisor.StopTimeout gets SIGKILL.
//   - The main process ended unasked, which is a crash. Nobody serves until whoever
//     watches the supervisor has started the service again, so the supervisor ends soon:
//     on Linux it waits for older generations for a second at most, and does not end
//     them. If it is process 1, its end is also theirs; under systemd, KillMode= decides;
//     elsewhere they finish their drain. All other processes of the service get SIGTERM,
//     and after Supervisor.StopTimeout SIGKILL.
//   - The main process ended during an upgrade. The supervisor waits for the new process
//     to report that it is the main process, for Supervisor.TakeoverTimeout at most. If
//     it does not, the service has ended as above.
//   - On Linux, the main process ended unasked with status 0, and another process of the
//     service has a socket that clients can reach. Then it has handed over, and could
//     not say so, for lack of NOTIFY_SOCKET or from another network namespace. The
//     supervisor follows the process with the socket, and logs an error.
//
// TERM, INT and QUIT that arrive after the main process has ended go to all processes
// that are left. The supervisor does not wait for a process that is still there 5
// seconds after SIGKILL. The exit status is
//
//	0 to 255  the main process's status
//	128+n     if signal n has killed the main process
//	1         if the main process ended unasked with status 0 during an upgrade
//	125       if the supervisor could not start
//	126, 127  if the service's program could not be executed, or was not found
//
// Only its parent learns the status of a process, except on Linux 6.15 and later. If a
// main process ends before the older generation that started it, the status is
// therefore unknown on other systems. The supervisor then ends with 0 if the main
// process said STOPPING, and with 1 otherwise.
//
// # Terminals
//
// The service gets a process group of its own, and its group gets the terminal's
// foreground, as from a shell. The terminal sends Ctrl-C and Ctrl-Z to the service, and
// the supervisor does not repeat them. When Ctrl-Z stops the service, the supervisor's
// own job stops with it; the shell's fg and bg continue both.
//
// A new generation is in the group of the old one, unless it calls Self, which gives it
// a group of its own; the foreground follows the main process. So without Self, Ctrl-C
// also reaches an older generation while it drains; service.Run ignores the first one.
// With Self, Ctrl-Z while an older generation drains returns to the prompt only when the
// older generation has ended, because until then the kernel reports only that process to
// the shell.
//
// If the terminal is not its standard input, the supervisor keeps the foreground, and
// forwards the signals that it gets.
//
// # Limits
//
// The supervisor itself is not upgraded: it goes on with the binary that it was
// started from, whatever is at its path. If the supervisor is killed, the service goes
// on without one, and keeps its addresses, with two exceptions: if the supervisor is
// PID 1, the kernel ends all processes of the container; and systemd ends what is left
// in the control group.
//
// On Linux, 64-bit FreeBSD and DragonFly the supervisor becomes the parent of all
// orphans (on Linux by PR_SET_CHILD_SUBREAPER). On macOS, NetBSD and OpenBSD only PID 1
// can be their parent. There the exit status of all generations but the first is
// unknown, their end is noticed within a second, and only processes that stayed in the
// main process's group are stopped with it. On all other systems nothing is started, and
// the error is errors.ErrUnsupported.
package supervise

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"time"
)

// Defaults of a Supervisor.
const (
	DefaultTakeoverTimeout = time.Minute
	DefaultStopTimeout     = 30 * time.Second
)

// Exit statuses for a service that did not start, as shells have them.
const (
	StatusFailed        = 125 // the supervisor could not start
	StatusNotExecutable = 126 // the service's program could not be executed
	StatusNotFound      = 127 // the service's program was not found
)

// A Supervisor describes what to supervise, and how. Only Command must be set.
type Supervisor struct {
	// Command is the service's program, which is looked up in PATH if it has no
	// slash, and its arguments.
	Command []string

	// TakeoverTimeout limits how long the new process may take to report that it is the
	// main one if the old one has died during an upgrade. If zero or negative,
	// [DefaultTakeoverTimeout] is used.
	TakeoverTimeout time.Duration

	// StopTimeout limits how long older generations, and processes that the service
	// left behind, may live once the main process has ended. If zero or negative,
	// [DefaultStopTimeout] is used.
	StopTimeout time.Duration

	// PIDFile, if not empty, is for services that do not use NOTIFY_SOCKET. When the
	// main process has ended, the process that this file names becomes the main process,
	// if it is alive and belongs to the service.
	PIDFile string

	// Logger, if not nil, receives records of generations and signals.
	Logger *slog.Logger
}

// Run starts the service and blocks until it has ended, which "How it ends" above
// describes. It returns the exit status that the calling process should end with. If the
// service was not started, the error wraps that of [exec.LookPath], that of the kernel,
// or [errors.ErrUnsupported]. Otherwise the error is nil. Signals that arrive before the
// service was started are forwarded once it was.
//
// Run receives the signals that it forwards and waits for all children of the process. A
// program that calls Run should do nothing else.
func (s Supervisor) Run() (status int, err error) {
	if !supported {
		return StatusFailed, errNotSupported
	}
	if len(s.Command) == 0 {
		return StatusFailed, errors.New("supervise: no command")
	}
	path, err := exec.LookPath(s.Command[0])
	if err != nil {
		err = fmt.Errorf("supervise: %w: %w", errNotStarted, err)
		return startStatus(err), err
	}
	return s.start(path, false)
}

// Self makes the program its own supervisor. Call it first in main. It starts the
// program again, with the same arguments, and supervises the new process. The first
// process does not return from Self: it exits with the status that Run returns. In the
// process that it has started, in all later generations, and under tableflip-supervise,
// Self returns nil at once.
//
// If Self returns an error, it has started nothing. The error wraps
// [errors.ErrUnsupported] on systems where no program can be supervised.
//
// A child process that calls Self is taken for a new generation. If a service starts
// another program that calls Self, it must remove TABLEFLIP_SUPERVISOR from that
// program's environment.
func Self() error { return Supervisor{}.Self() }

// Self is the function Self with these options. Command is ignored.
func (s Supervisor) Self() error {
	if !supported {
		return errNotSupported
	}
	if isSupervised() {
		return adopt()
	}
	s.Command = os.Args
	// What argv[0] names, which is where upgrades look for the next binary.
	path, err := exec.LookPath(os.Args[0])
	if err != nil {
		path, err = os.Executable()
	}
	if err != nil {
		return fmt.Errorf("supervise: find this program: %w", err)
	}
	status, err := s.start(path, true)
	if err != nil {
		return err
	}
	os.Exit(status)
	panic("unreachable")
}

// start fills in the defaults.
func (s Supervisor) start(path string, self bool) (int, error) {
	s.TakeoverTimeout = cmp.Or(max(s.TakeoverTimeout, 0), DefaultTakeoverTimeout)
	s.StopTimeout = cmp.Or(max(s.StopTimeout, 0), DefaultStopTimeout)
	s.Logger = cmp.Or(s.Logger, slog.New(slog.DiscardHandler))
	status, err := s.run(path, self)
	if err != nil {
		return startStatus(err), fmt.Errorf("supervise: %w", err)
	}
	return status, nil
}

func startStatus(err error) int {
	switch {
	case !errors.Is(err, errNotStarted):
		return StatusFailed
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, exec.ErrNotFound):
		return StatusNotFound
	}
	return StatusNotExecutable
}

var errNotSupported = fmt.Errorf("supervise: not on %s: %w", runtime.GOOS, errors.ErrUnsupported)

// errNotStarted is wrapped by errors that concern the service's program.
var errNotStarted = errors.New("can't start the service")
