package tableflip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/registry"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/systemd"
)

// This file owns the states of an Upgrader and the transitions between them.

// DefaultUpgradeTimeout is how long a new process may take to become ready if
// Options.UpgradeTimeout is zero.
const DefaultUpgradeTimeout = time.Minute

var (
	// ErrNotSupported is returned by New on platforms that cannot pass
	// listeners to another process: Windows, Plan 9, JavaScript and WASI.
	ErrNotSupported = fmt.Errorf("tableflip: platform does not support graceful restart: %w", errors.ErrUnsupported)

	// ErrNotReady is returned by Upgrade before Ready.
	ErrNotReady = errors.New("tableflip: process is not ready yet")

	// ErrUpgradeInProgress is returned by Upgrade during another one.
	ErrUpgradeInProgress = errors.New("tableflip: upgrade in progress")

	// ErrParentRunning is returned by Upgrade while the previous process drains.
	ErrParentRunning = errors.New("tableflip: parent hasn't exited")

	// ErrUpgraded is returned once the process has been replaced.
	ErrUpgraded = errors.New("tableflip: already upgraded")

	// ErrStopped is returned after Stop.
	ErrStopped = errors.New("tableflip: terminating")
)

// Options are the options of New. The zero value is usable.
type Options struct {
	// UpgradeTimeout is how long a new process may take to become ready until
	// it is killed. Zero, and less, means DefaultUpgradeTimeout.
	UpgradeTimeout time.Duration

	// PIDFile, if not empty, is the path of a file that holds the PID of the
	// process in charge. Ready writes it, with mode 0644 less the umask, and
	// replaces it at once, by renaming a temporary file in its directory, which
	// must be writable. A failed upgrade restores it, and Stop removes it. A
	// relative path is relative to the directory that the process started in.
	PIDFile string

	// ListenConfig is what Listen and ListenPacket create sockets with. Its
	// keep-alive parameters also apply to inherited TCP listeners. Nil means
	// the zero ListenConfig.
	ListenConfig *net.ListenConfig

	// Command, if not nil, is called by every Upgrade to change how the new
	// process is started. The command is complete when it is called: this
	// process's arguments, environment and standard streams, the binary that
	// os.Args[0] names now, and the directory that this process started in. It
	// may change anything but ExtraFiles, and may start a wrapper that execs
	// the service, or starts it in the background and exits, if that keeps
	// descriptors from 3 on, and environment variables, intact. A wrapper that
	// stays would keep the sockets open, and be killed in the service's place
	// when an upgrade fails. Output must go to files, as this process will not be
	// there to copy it. It must not wait for Stop, which waits for the upgrade.
	Command func(*exec.Cmd)

	// DescriptorStore has systemd keep a copy of every listener and packet conn
	// (FileDescriptorStoreMax= in the unit must allow for as many), so that they
	// outlive a crash: connections wait in their queues until Restart= has
	// started a new first generation, whose Listen returns the same sockets.
	// Stop and the Remove methods have the copies closed, so that a restart by
	// systemctl is none the better for them.
	DescriptorStore bool

	// Logger, if not nil, is told which inherited descriptors nobody claimed,
	// of errors while cleaning up, if a new process dies before the old one, and
	// if the service manager can't be told something.
	Logger *slog.Logger
}

// upgraderExists is true from a successful New to Stop.
var upgraderExists atomic.Bool

type state int

const (
	starting  state = iota // New has returned, Ready has not
	ready                  // in charge
	upgrading              // in charge, with a child that is starting
	upgraded               // the child is in charge
	stopped
)

// An Upgrader replaces this process by a new one, and passes descriptors to it.
// Its Fds, whose methods it has, holds those. All methods are safe for concurrent
// use.
type Upgrader struct {
	*Fds

	upgradeTimeout time.Duration
	pidFile        pidFile
	command        func(*exec.Cmd)
	logger         *slog.Logger
	parent         *parent           // nil in the first generation
	notifier       *systemd.Notifier // nil if nobody wants to be notified

	readyMu sync.Mutex    // held by Ready, so that calls at once all return one result
	stop    chan struct{} // closed when Stop begins
	exit    chan struct{} // closed when the process is to drain and exit

	mu            sync.Mutex
	state         state
	cancelUpgrade context.CancelCauseFunc // valid while upgrading
	upgradeEnded  chan struct{}           // valid while upgrading, closed at its end
	released      bool                    // Stop has made room for another Upgrader
}

// New creates the Upgrader of this process. It takes over what a parent passes
// on, or what systemd does by LISTEN_FDS if LISTEN_PID is this process, and removes
// their word from the environment, so that it should be called before other
// processes are started. It does not block.
//
// There is one Upgrader per process at a time: New may be called again after
// Stop, or after an error. It returns ErrNotSupported where upgrades are not
// possible. If a parent's word is unreadable, New fails every time: the process
// should exit, which leaves the parent as it was.
func New(opts Options) (*Upgrader, error) {
	if !descriptor.Supported {
		return nil, ErrNotSupported
	}
	path, err := process.FromDir(opts.PIDFile)
	if err != nil {
		return nil, err
	}
	if !upgraderExists.CompareAndSwap(false, true) {
		return nil, errors.New("tableflip: only a single Upgrader allowed: stop the other one first")
	}
	notifier := systemd.FindNotifier(opts.Logger)
	registry, parent, err := inherit(opts, notifier)
	if err != nil {
		upgraderExists.Store(false)
		return nil, err
	}
	timeout := opts.UpgradeTimeout
	if timeout <= 0 {
		timeout = DefaultUpgradeTimeout
	}
	return &Upgrader{
		Fds:            &Fds{registry},
		upgradeTimeout: timeout,
		pidFile:        pidFile{path: path},
		command:        opts.Command,
		logger:         opts.Logger,
		parent:         parent,
		notifier:       notifier,
		stop:           make(chan struct{}),
		exit:           make(chan struct{}),
	}, nil
}

// inherit takes over what a parent left or, in the first generation, which has a
// nil parent, what the service manager passed.
func inherit(opts Options, notifier *systemd.Notifier) (*registry.Registry, *parent, error) {
	registryOpts := registry.Options{Logger: opts.Logger}
	if opts.ListenConfig != nil {
		registryOpts.ListenConfig = *opts.ListenConfig
	}
	if notifier != nil {
		registryOpts.Store = notifier.NewStore(opts.DescriptorStore)
	}

	t, err := findTable()
	if err != nil {
		return nil, nil, err
	}
	if t == nil {
		r, err := inheritActivated(registryOpts)
		return r, nil, err
	}
	r, err := registry.New(registryOpts, firstDescriptor, t.Entries)
	if err != nil {
		return nil, nil, err
	}
	p, err := newParent()
	if err != nil {
		return nil, nil, err
	}
	forgetVariables()
	return r, p, nil
}

func inheritActivated(opts registry.Options) (*registry.Registry, error) {
	entries, err := systemd.ActivatedFDs(registry.ManagerNetwork)
	if err != nil {
		return nil, err
	}
	r, err := registry.New(opts, systemd.FirstFD, entries)
	if err == nil {
		err = r.DescribeStored()
	}
	if err != nil {
		return nil, err
	}
	forgetVariables()
	return r, systemd.ForgetActivatedFDs()
}

// HasParent reports whether this process was started by an upgrade. That stays
// true when the parent has exited.
func (u *Upgrader) HasParent() bool {
	return u.parent != nil
}

// Exit returns a channel that is closed when the process should drain and exit:
// after a successful upgrade, and by Stop.
func (u *Upgrader) Exit() <-chan struct{} {
	return u.exit
}

// Ready says that this process can serve: that it has taken and created its
// listeners, and has all that it needs to answer. It must be called by every
// generation. Accept from the listeners once Ready has returned nil. What a child
// accepts before is lost if its parent then refuses it; what nobody accepts waits
// in the queue.
//
// It writes the PID file. In a child it then blocks until the parent has decided,
// which takes no longer than the parent's UpgradeTimeout, and while the parent
// is suspended. If the parent refuses, Ready returns an error, and the process
// should exit without touching what it shares with the parent; if it has died,
// this process is in charge, and Ready returns nil. Before it does, it closes
// inherited descriptors that nobody took, and unlinks the files of those that
// are Unix sockets, other than systemd's. In the first generation it tells the
// service manager, if there is one, that the service is up.
//
// Once it has returned nil, Upgrade is accepted (in a child: once its parent has
// exited), and Ready does nothing any more. It returns ErrStopped after Stop, and
// as soon as Stop is called. If it could not write the PID file, it can be tried
// again.
func (u *Upgrader) Ready() error {
	u.readyMu.Lock()
	defer u.readyMu.Unlock()

	u.mu.Lock()
	defer u.mu.Unlock()
	switch u.state {
	case starting:
	case stopped:
		return ErrStopped
	default:
		return nil
	}
	if u.parent != nil {
		if err := u.askParent(); err != nil {
			return err
		}
	} else {
		if err := u.pidFile.write(); err != nil {
			return err
		}
		process.Prepare()
	}
	u.registry.TakeCharge()
	u.state = ready
	u.notifyReady()
	return nil
}

// notifyReady tells the service manager that this process is in charge, unless its
// parent does, to which the manager listens until it has exited.
func (u *Upgrader) notifyReady() {
	switch {
	case u.notifier == nil:
	case u.parent == nil:
		u.notifier.Ready()
		u.registry.OpenStore()
	default:
		go func() {
			<-u.parent.exited
			if !u.parent.notified {
				u.notifyMainPID()
			}
			u.registry.OpenStore()
		}()
	}
}

// notifyMainPID is for a child whose parent has died before it could do that.
// systemd has ended the service then; other managers may have waited.
func (u *Upgrader) notifyMainPID() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.state == ready || u.state == upgrading {
		u.notifier.MainPID(os.Getpid(), u.state == ready)
	}
}

// askParent asks to be put in charge. It unlocks u.mu while it waits.
func (u *Upgrader) askParent() error {
	select {
	case <-u.parent.decided:
		if u.parent.refusal != nil {
			return u.parent.refusal
		}
	default:
	}
	// This is the one thing that others see before the commit: systemd reads the
	// file when the parent exits, which may be right after it.
	if err := u.pidFile.write(); err != nil {
		return err
	}
	u.parent.sayReady()

	u.mu.Unlock()
	process.Prepare() // for the next upgrade, while there is nothing else to do
	select {
	case <-u.parent.decided:
	case <-u.stop:
	}
	u.mu.Lock()

	if u.state == stopped {
		return ErrStopped
	}
	<-u.parent.decided
	step.Reached(step.VerdictReceived)
	u.parent.closeReady()
	return u.parent.refusal
}

// WaitForParent blocks until the parent has exited, or ctx is done, whose cause
// it then returns. Without a parent it returns at once. If the parent has aborted
// the upgrade, it returns an error. Call it after Ready: the parent does not exit
// before.
func (u *Upgrader) WaitForParent(ctx context.Context) error {
	if u.parent == nil {
		return nil
	}
	select {
	case <-u.parent.decided:
	case <-ctx.Done():
		return fmt.Errorf("tableflip: wait for the parent: %w", context.Cause(ctx))
	}
	if u.parent.refusal != nil {
		return u.parent.refusal
	}
	select {
	case <-u.parent.exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("tableflip: wait for the parent: %w", context.Cause(ctx))
	}
}

// Upgrade is UpgradeContext without a context of its own.
func (u *Upgrader) Upgrade() error {
	return u.UpgradeContext(context.Background())
}

// UpgradeContext starts a new process and blocks until it is ready. Then the new
// process is in charge, Exit is closed, and this process should stop accepting,
// finish what it has begun, and exit. If there is a service manager, Exit is closed
// once that knows its new main process, or takes too long to read (seconds).
//
// After an error everything is as it was, the new process has been killed and
// reaped, and UpgradeContext can be called again, unless it is ErrUpgraded or
// ErrStopped. The deadline of ctx, if it has one, takes the place of
// Options.UpgradeTimeout. An error that does not just say in words what the new
// process did is, or wraps,
//
//   - ErrNotReady, ErrUpgradeInProgress, ErrParentRunning, ErrUpgraded or
//     ErrStopped, if that was the state, or Stop was called meanwhile;
//   - os.ErrDeadlineExceeded, if Options.UpgradeTimeout has passed;
//   - the cause of ctx's end;
//   - an *exec.ExitError, if the new process failed, except under systemd, whose
//     child it is;
//   - what os/exec returned, for example os.ErrNotExist, if it could not be
//     started.
func (u *Upgrader) UpgradeContext(ctx context.Context) error {
	return u.upgrade(ctx)
}

func (u *Upgrader) upgrade(callerCtx context.Context) (err error) {
	ctx, err := u.beginUpgrade(callerCtx)
	if err != nil {
		return err
	}
	defer func() { u.endUpgrade(err) }()

	before, err := u.pidFile.read()
	if err != nil {
		return err
	}
	c, err := u.startChild(ctx)
	if err != nil {
		return err
	}
	committed := false
	defer func() {
		if committed {
			return
		}
		c.abort()
		if err := u.pidFile.restore(before); err != nil && u.logger != nil {
			u.logger.Error("tableflip: can't restore the PID file", "error", err)
		}
	}()

	if err := c.awaitReady(ctx); err != nil {
		return err
	}
	mainPID, err := u.prepareMainPID()
	if err != nil {
		return err
	}
	defer mainPID.Close()
	u.mu.Lock()
	defer u.mu.Unlock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// Ctx follows its caller's from a goroutine, that may not have run yet.
	if callerCtx.Err() != nil {
		return cancelled(callerCtx)
	}
	if err := c.commit(u.logger); err != nil {
		return err
	}
	committed = true
	u.state = upgraded
	u.logCleanUp(u.pidFile.remove()) // names the new process, unless it has another file
	if mainPID.Notify(c.pid) {
		c.managerNotified()
	}
	close(u.exit)
	u.registry.HandOver(ErrUpgraded)
	return nil
}

// beginUpgrade enters the state upgrading. The context that it returns ends when
// the upgrade must.
func (u *Upgrader) beginUpgrade(callerCtx context.Context) (context.Context, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch u.state {
	case starting:
		return nil, ErrNotReady
	case upgrading:
		// It answers this reload, too.
		u.notifier.Reloading()
		return nil, ErrUpgradeInProgress
	case upgraded:
		return nil, ErrUpgraded
	case stopped:
		return nil, ErrStopped
	}
	select {
	case <-u.stop:
		return nil, ErrStopped
	default:
	}
	var refusal error
	switch {
	case u.parent != nil && !u.parent.hasExited():
		refusal = ErrParentRunning
	case callerCtx.Err() != nil:
		refusal = cancelled(callerCtx)
	}
	if refusal != nil {
		// The manager may have asked for it, and wait for an answer.
		u.notifier.Reloading()
		u.notifier.ReloadFailed(refusal)
		return nil, refusal
	}

	ctx, cancel := context.WithCancelCause(context.WithoutCancel(callerCtx))
	var timer *time.Timer
	disconnect := context.AfterFunc(callerCtx, func() { cancel(cancelled(callerCtx)) })
	if _, ok := callerCtx.Deadline(); !ok {
		timer = time.AfterFunc(u.upgradeTimeout, func() {
			cancel(fmt.Errorf("tableflip: new process was not ready after %v: %w", u.upgradeTimeout, os.ErrDeadlineExceeded))
		})
	}
	u.state = upgrading
	u.notifier.Reloading()
	u.upgradeEnded = make(chan struct{})
	u.cancelUpgrade = func(cause error) {
		cancel(cause)
		disconnect()
		if timer != nil {
			timer.Stop()
		}
	}
	return ctx, nil
}

func cancelled(callerCtx context.Context) error {
	return fmt.Errorf("tableflip: upgrade cancelled: %w", context.Cause(callerCtx))
}

// endUpgrade leaves the state upgrading, unless a commit has.
func (u *Upgrader) endUpgrade(err error) {
	u.registry.Unfreeze()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.state == upgrading {
		u.state = ready
		if err == nil {
			err = errors.New("tableflip: Options.Command has panicked")
		}
		u.notifier.ReloadFailed(err)
	}
	u.cancelUpgrade(nil)
	close(u.upgradeEnded)
}

// prepareMainPID fails for lack of descriptors.
func (u *Upgrader) prepareMainPID() (*systemd.MainPIDUpdate, error) {
	update, err := u.notifier.PrepareMainPID()
	if err != nil {
		return nil, fmt.Errorf("tableflip: prepare to tell the service manager: %w%s", err, process.LimitHint(err))
	}
	return update, nil
}

func (u *Upgrader) startChild(ctx context.Context) (*child, error) {
	cmd, err := newCommand(u.command)
	if err != nil {
		return nil, err
	}
	entries, files, release, err := u.registry.FreezeForChild()
	if err != nil {
		return nil, err
	}
	defer release()
	return startChild(ctx, cmd, systemd.IsParent(), entries, files)
}

// Stop ends what the Upgrader does: it aborts an upgrade under way, closes what
// the registry holds, and lets New be called again. A process in charge also
// unlinks all Unix sockets of the registry and removes the PID file, if it still
// names this process; one that was never put in charge unlinks only the sockets
// that it created itself. After a successful upgrade there is nothing to do. A
// process in charge also tells the service manager that the service stops.
//
// When Stop returns, all of this is done and Exit is closed. It blocks only as
// long as it takes to kill a new process that is starting or, in a child that waits
// in Ready, to learn the parent's verdict, for a second at the most, or until the
// service manager has been told.
func (u *Upgrader) Stop() {
	u.mu.Lock()
	defer u.mu.Unlock()
	select {
	case <-u.stop:
	default:
		close(u.stop)
	}
	for u.state == upgrading {
		u.cancelUpgrade(ErrStopped)
		ended := u.upgradeEnded
		u.mu.Unlock()
		<-ended
		u.mu.Lock()
	}
	if u.state != upgraded && u.state != stopped {
		// A first generation that was never ready leaves what systemd has kept
		// for it over a crash to the one after it.
		inCharge := u.parent == nil && u.state != starting || u.parent != nil && u.parent.waitAbandoned()
		u.state = stopped
		if inCharge {
			u.notifier.Stopping()
		}
		u.registry.Stop(inCharge, ErrStopped)
		if inCharge {
			u.logCleanUp(u.pidFile.remove())
		}
		close(u.exit)
	}
	if !u.released {
		u.released = true
		upgraderExists.Store(false)
	}
}

func (u *Upgrader) logCleanUp(err error) {
	if err != nil && u.logger != nil {
		u.logger.Warn("tableflip: cleaning up", "error", err)
	}
}
