// Package supervise keeps a process in place while the generations of a service come
// and go. Containers need it because they end with the process that they started,
// supervisors and shells because they watch no other. The command tableflip-supervise
// runs any program below such a process. A program that calls [Self] runs itself below
// one.
//
// # What it follows
//
// The supervisor acts like systemd with Type=notify: it offers NOTIFY_SOCKET, and
// learns from MAINPID which process is the main one (sd_notify(3)). Package tableflip
// sends that without any code in the service. While the main process lives, only its
// messages count, which is systemd's default, too: a start script must exec the server.
// Messages from processes that are not the service's are ignored. On Linux the kernel
// names the sender; elsewhere only this user can write.
//
// The supervisor forwards HUP, TERM, INT, QUIT, USR1, USR2, WINCH, CONT and TSTP to the
// main process of the moment. If the main process has died in an upgrade, and its child
// may be about to take over, signals wait for the child. The child also gets those that
// the old process got during the upgrade, because that may not have lived to obey them.
// TERM, INT and QUIT that reached the old process during an upgrade go to the new one
// when the upgrade has succeeded, because the old one no longer stops the service.
//
// If it runs under a NOTIFY_SOCKET itself, it passes READY, RELOADING, STOPPING,
// STATUS and the watchdog's messages on, with itself as the main process. Sockets
// that it was given by LISTEN_FDS go to the service, with the service's PID in
// LISTEN_PID: for that the program that calls Run is started again, and executes the
// service from an init function of this package. The descriptors of FDSTORE are
// closed.
//
// Neither the log nor the outer NOTIFY_SOCKET can block the supervisor. What is not
// read in time is dropped. The log says how many records are missing, and of the
// messages the last ones are kept.
//
// # How it ends
//
// When the main process has ended and nobody takes over, older generations may
// finish their drain, everything else that the service left behind gets SIGTERM, and
// what is still there after Supervisor.StopTimeout SIGKILL. TERM, INT and QUIT then
// go to all of them. The exit status is the main process's, or 128+n if signal n
// killed it, but 1 in place of 0 if it ended in the middle of an upgrade. If the main
// process ends before its own parent, another generation, has, only Linux 6.15 and
// later tell its status; elsewhere it is 0 if the service said STOPPING, and 1
// otherwise.
//
// A main process that ends unasked, without a signal to stop and without STOPPING, has
// crashed, and nobody serves until whoever watches the supervisor has started it again.
// So on Linux the supervisor waits no more than a second for older generations then,
// for the requests that are nearly answered, and leaves them alone: as process 1 its
// end is theirs, under systemd KillMode decides, and elsewhere they finish their drain.
//
// A main process that ends unasked with status 0, while another process of the service
// has a socket that clients can reach, has handed over, and could not say so (without
// NOTIFY_SOCKET, or from another network namespace). On Linux the supervisor follows
// that process, and logs an error.
//
// # Terminals
//
// The service gets a process group of its own, and that group the terminal's
// foreground, as from a shell: the terminal sends Ctrl-C and Ctrl-Z to the service,
// and the supervisor does not repeat them. When Ctrl-Z stops the service, the
// supervisor's own job stops with it; the shell's fg and bg continue both.
//
// New generations are in the group of the old, unless they leave it, as Self has them
// do; the foreground follows. So without Self, Ctrl-C also reaches an older generation
// while it drains; service.Run ignores the first one. With Self, Ctrl-Z while an older
// generation drains returns to the prompt only when that has ended, because until then
// the kernel reports only that process to the shell.
//
// If the terminal is not its standard input, the supervisor keeps the foreground,
// and passes on what it gets.
//
// # Limits
//
// The supervisor itself is not upgraded: it goes on with the binary that it was
// started from, whatever is at its path. SIGKILL to it leaves the service without a
// supervisor, and with its port, except as PID 1, where the kernel ends all, and under
// systemd, which ends what is left in the control group.
//
// On Linux it becomes the parent of all orphans (PR_SET_CHILD_SUBREAPER), and on
// 64-bit FreeBSD and DragonFly. On macOS, NetBSD and OpenBSD only PID 1 is that: there
// the exit status of all generations but the first is unknown, their end is noticed
// within a second, and only what stayed in the main process's group is stopped with
// it. Elsewhere nothing is started, and the error is errors.ErrUnsupported.
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
	StatusFailed        = 125 // the supervisor itself
	StatusNotExecutable = 126
	StatusNotFound      = 127
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

	// PIDFile, if not empty, is for services that know nothing of NOTIFY_SOCKET:
	// when the main process has ended, the process that this file names is the
	// next, if it is alive and the service's.
	PIDFile string

	// Logger, if not nil, receives records of generations and signals.
	Logger *slog.Logger
}

// Run starts the service and returns when all of it has ended, with the exit status
// that the calling process should end with. If the service was not started, the error
// wraps that of [exec.LookPath], that of the kernel, or [errors.ErrUnsupported].
// Otherwise it is nil. Signals that arrive before the start wait for it.
//
// Run takes all signals and waits for all children of the process, and must be
// alone in it.
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
// program again, with the same arguments, and supervises that. The first process does
// not return from Self: it exits with the status that Run returns. In the process that
// it has started, in all later generations, and below tableflip-supervise, Self returns
// nil at once.
//
// If Self returns an error, it has started nothing. The error wraps
// [errors.ErrUnsupported] on systems where no program can be supervised.
//
// A child that calls Self is taken for a new generation. Start other programs that
// call it without the environment variable TABLEFLIP_SUPERVISOR.
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
