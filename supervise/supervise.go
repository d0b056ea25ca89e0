// Package supervise keeps a process in place while the generations of a service
// come and go: for containers, which end with the process that they started, and
// for supervisors and shells, which watch that one. Command tableflip-supervise
// runs any program underneath it; a program that calls Self runs itself so.
//
// # What it follows
//
// It is to the service what systemd is to one of Type=notify: it offers
// NOTIFY_SOCKET, and learns from MAINPID which process is the main one, as
// sd_notify(3) says. A service on package tableflip says so without any code for it.
// While the main process lives only that is heard, as systemd does by default: a
// start script must exec the server. Processes that are not the service's are never
// heard; on Linux the kernel tells who writes, elsewhere only this user can.
// Signals that the supervisor gets go to the main process of the moment: HUP, TERM,
// INT, QUIT, USR1, USR2, WINCH, CONT and TSTP. While the main process has died in an
// upgrade, and its child may be about to take over, they wait for that one, which
// also gets those that the old one got in the upgrade and may not have lived to
// obey. After an upgrade that succeeded, TERM, INT and QUIT go to the new process
// too: the old one, having handed over, does not stop the service by them.
//
// If it runs under a NOTIFY_SOCKET itself, it passes READY, RELOADING, STOPPING,
// STATUS and the watchdog's messages on, with itself as the main process. Sockets
// that it was given by LISTEN_FDS go to the service, with the service's PID in
// LISTEN_PID: for that the program that calls Run is started again, and executes the
// service from an init function of this package. The descriptors of FDSTORE are
// closed.
//
// Neither the log nor the outer NOTIFY_SOCKET holds it up: what is not read in time is
// dropped. The log says how much; of the messages the last are kept.
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
// New generations are in the group of the old, unless they leave it, as Self has
// them do; the foreground follows. So without Self, Ctrl-C also reaches an older
// generation while it drains, which service.Run ignores once. With Self, Ctrl-Z
// while one drains gives the prompt back only when that has ended: until then, it
// is the one that the kernel tells.
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

// A Supervisor says what to supervise. Only Command must be set.
type Supervisor struct {
	// Command is the service's program, which is looked up in PATH if it has no
	// slash, and its arguments.
	Command []string

	// TakeoverTimeout is how long the new process may take to say that it is the
	// main one if the old one has died in the middle of an upgrade. Zero, and less, means
	// DefaultTakeoverTimeout.
	TakeoverTimeout time.Duration

	// StopTimeout is how long older generations, and processes that the service
	// left behind, may live on once the main process has ended. Zero, and less, means
	// DefaultStopTimeout.
	StopTimeout time.Duration

	// PIDFile, if not empty, is for services that know nothing of NOTIFY_SOCKET:
	// when the main process has ended, the process that this file names is the
	// next, if it is alive and the service's.
	PIDFile string

	// Logger is told of generations and signals. Nil means silence.
	Logger *slog.Logger
}

// Run starts the service and returns when all of it has ended, with the exit status
// that the calling process should end with. The error is not nil only if the
// service was not started: it then wraps what exec.LookPath or the kernel said, or
// errors.ErrUnsupported. Signals that arrive before the start wait for it.
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

// Self makes the program its own supervisor. It is to be called first in main: it
// starts the program again, with the same arguments, and returns nil only there and
// in all generations after that; the first process exits from within it, with the
// status that Run tells. Underneath tableflip-supervise, too, it returns at once.
//
// An error says why the program cannot be supervised; nothing was started then. It
// wraps errors.ErrUnsupported where that is so of any program.
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
