package tableflip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/logqueue"
	"example.com/tableflip/internal/nametable"
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

	// The texts of the five that follow are those of cloudflare/tableflip, whose
	// users compare them.

	// ErrNotReady is returned by Upgrade before Ready.
	ErrNotReady = errors.New("process is not ready yet")

	// ErrUpgradeInProgress is returned by Upgrade during another one.
	ErrUpgradeInProgress = errors.New("upgrade in progress")

	// ErrParentRunning is returned by Upgrade while the previous process drains.
	ErrParentRunning = errors.New("parent hasn't exited")

	// ErrUpgraded is returned once the process has been replaced.
	ErrUpgraded = errors.New("already upgraded")

	// ErrStopped is returned after Stop.
	ErrStopped = errors.New("terminating")
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

// inherited is the parent of this process, for the Upgraders after the first one. It
// is guarded by upgraderExists.
var inherited *parent

type state int

const (
	starting  state = iota // New has returned, Ready has not
	accepting              // Ready takes charge
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
	logger         *slog.Logger    // nil for none
	logs           *logqueue.Queue // of logger, held by methods for which its handler could wait
	parent         *parent         // nil in the first generation
	managerEnv     systemd.Env
	notifier       *systemd.Notifier // nil if nobody wants to be notified

	readyMu sync.Mutex    // held by Ready, so that calls at once all return one result
	stop    chan struct{} // closed when Stop begins
	ended   chan struct{} // closed when Stop ends
	exit    chan struct{} // closed when the process is to drain and exit

	// Under mu nothing blocks.
	mu       sync.Mutex
	state    state
	accepted chan struct{} // while accepting: closed at its end
	attempt  *attempt      // while upgrading
	child    *child        // once upgraded
}

// An attempt is an upgrade under way.
type attempt struct {
	caller   context.Context
	ctx      context.Context // ends when the attempt must, before the commit
	stopCtx  context.Context // ends when Stop is called
	cancel   context.CancelCauseFunc
	stop     context.CancelCauseFunc
	returned chan struct{} // closed when Upgrade returns

	// Guarded by Upgrader.mu:
	reloadAgain bool   // the manager asked for another reload meanwhile
	answered    bool   // the manager was told how it went
	undecided   *child // Upgrade has returned, and this child may still take charge
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
	path, err := fromInitialDir(opts.PIDFile)
	if err != nil {
		return nil, err
	}
	if !upgraderExists.CompareAndSwap(false, true) {
		return nil, errors.New("tableflip: only a single Upgrader allowed: stop the other one first")
	}
	logs := new(logqueue.Queue)
	opts.Logger = logs.Logger(opts.Logger)
	env := systemd.FindEnv()
	notifier := env.Notifier(opts.Logger)
	registry, parent, err := takeOver(opts, notifier)
	if err != nil {
		upgraderExists.Store(false)
		return nil, err
	}
	timeout := opts.UpgradeTimeout
	if timeout <= 0 {
		timeout = DefaultUpgradeTimeout
	}
	u := &Upgrader{
		Fds:            &Fds{registry},
		upgradeTimeout: timeout,
		pidFile:        pidFile(path),
		command:        opts.Command,
		logger:         opts.Logger,
		logs:           logs,
		parent:         parent,
		managerEnv:     env,
		notifier:       notifier,
		stop:           make(chan struct{}),
		ended:          make(chan struct{}),
		exit:           make(chan struct{}),
	}
	if parent != nil {
		parent.listen(func() { go u.answerReload() })
	}
	return u, nil
}

// takeOver inherits what a parent left or, in the first generation, which has a nil
// parent, what the service manager passed.
func takeOver(opts Options, notifier *systemd.Notifier) (*registry.Registry, *parent, error) {
	registryOpts := registry.Options{Logger: opts.Logger}
	if opts.ListenConfig != nil {
		registryOpts.ListenConfig = *opts.ListenConfig
	}
	if notifier != nil {
		registryOpts.Store = notifier.NewStore(opts.DescriptorStore)
	}
	if inherited != nil {
		// An earlier Upgrader of this process had what there was.
		if err := inherited.abandonment(); err != nil {
			return nil, nil, err
		}
		r, err := registry.New(registryOpts, inherit.FirstFD, nil)
		return r, inherited, err
	}

	t, err := findTable()
	if err != nil {
		return nil, nil, err
	}
	if t == nil {
		r, err := takeOverActivated(registryOpts)
		return r, nil, err
	}
	entries := ownEntries(t.Entries)
	r, err := registry.New(registryOpts, inherit.FirstFD, entries)
	if err != nil {
		return nil, nil, err
	}
	inherited, err = newParent(t)
	if err != nil {
		return nil, nil, err
	}
	inherited.handle = adoptOthers(t.Entries[len(entries):], inherit.FirstFD+uintptr(len(entries)))
	inherit.Forget()
	return r, inherited, nil
}

// ownEntries returns those of entries that belong to the registry, which come first.
func ownEntries(entries []*nametable.Entry) []*nametable.Entry {
	for i, e := range slices.Backward(entries) {
		switch e.Kind {
		case nametable.Listener, nametable.PacketConn, nametable.Conn, nametable.File:
			return entries[:i+1]
		}
	}
	return nil
}

// adoptOthers returns the handle of the parent's process, if it is among the
// descriptors of entries, which are open from first on. It closes the others, which
// come from a later version of this package.
func adoptOthers(entries []*nametable.Entry, first uintptr) (handle *process.Handle) {
	for i, e := range entries {
		fd := first + uintptr(i)
		if e.Name == parentHandle && handle == nil {
			if h, err := process.Inherited(fd); err == nil {
				handle = h
				continue
			}
		}
		_ = descriptor.Close(fd)
	}
	return handle
}

func takeOverActivated(opts registry.Options) (*registry.Registry, error) {
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
	inherit.Forget()
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
	defer u.logs.Hold()()
	u.readyMu.Lock()
	defer u.readyMu.Unlock()

	u.mu.Lock()
	state := u.state
	u.mu.Unlock()
	switch state {
	case starting:
	case stopped:
		return ErrStopped
	default:
		return nil
	}

	if u.parent != nil && !u.parent.isInCharge() {
		if err := u.askParent(); err != nil {
			return err
		}
	}
	u.mu.Lock()
	if isClosed(u.stop) {
		u.mu.Unlock()
		return ErrStopped
	}
	u.state = accepting
	u.accepted = make(chan struct{})
	u.mu.Unlock()

	err := u.takeCharge()

	u.mu.Lock()
	defer u.mu.Unlock()
	u.state = ready
	if err != nil {
		u.state = starting
	}
	close(u.accepted)
	return err
}

// askParent asks to be put in charge, and returns nil once the parent has done so, or
// has died.
func (u *Upgrader) askParent() error {
	if err := u.parent.abandonment(); err != nil {
		return err
	}
	if isClosed(u.parent.decided) && u.parent.refusal != nil {
		return u.parent.refusal
	}
	if err := u.pidFile.prepare(ownPID()); err != nil {
		return err
	}
	u.parent.sayReady()

	process.Prepare() // for the next upgrade, while there is nothing else to do
	select {
	case <-u.parent.decided:
	case <-u.stop:
	}
	if isClosed(u.stop) {
		return ErrStopped
	}
	step.Reached(step.VerdictReceived)
	return u.parent.refusal
}

// takeCharge makes this the process in charge. What it does after the
// acknowledgement cannot be undone.
func (u *Upgrader) takeCharge() error {
	// An Upgrader that is not the first one of its process needs nobody's leave.
	asks := u.parent != nil && !u.parent.isInCharge()
	if asks {
		if err := u.parent.takeCharge(u.pidFile.commit); err != nil {
			return err
		}
	} else {
		if err := u.pidFile.write(ownPID()); err != nil {
			return err
		}
		process.Prepare()
	}
	u.registry.TakeCharge()

	switch {
	case u.notifier == nil:
	case asks:
		go u.notifyAfterParent()
	default:
		u.notifier.Ready()
		u.registry.OpenStore()
	}
	return nil
}

// notifyAfterParent waits until the manager listens to this process: before, it
// listens to the parent.
func (u *Upgrader) notifyAfterParent() {
	<-u.parent.exited
	if !u.parent.notified {
		u.notifyMainPID()
	}
	u.registry.OpenStore()
}

// notifyMainPID is for a child whose parent has died before it could do that.
// systemd has ended the service then; other managers may have waited.
func (u *Upgrader) notifyMainPID() {
	u.mu.Lock()
	state := u.state
	u.mu.Unlock()
	if state != upgraded && state != stopped {
		u.notifier.MainPID(os.Getpid(), state != upgrading)
	}
}

// answerReload is called when the service manager has asked the parent for a reload
// right after the parent had handed over.
func (u *Upgrader) answerReload() {
	u.notifier.Reloading()
	u.notifier.Ready()
}

// WaitForParent blocks until the parent has exited, or ctx is done, whose cause
// it then returns. Without a parent it returns at once. If the parent has aborted
// the upgrade, it returns an error. Call it after Ready: the parent does not exit
// before.
func (u *Upgrader) WaitForParent(ctx context.Context) error {
	if u.parent == nil {
		return nil
	}
	return u.parent.wait(ctx)
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
func (u *Upgrader) UpgradeContext(ctx context.Context) (err error) {
	defer u.logs.Hold()()
	a, err := u.beginUpgrade(ctx)
	if err != nil {
		return err
	}
	defer func() { u.endUpgrade(a, err) }()

	before, err := u.pidFile.read()
	if err != nil {
		return err
	}
	c, err := u.startChild(a)
	if err != nil {
		return err
	}
	err = u.handOver(a, c)
	if err == nil {
		return nil
	}

	if abortErr := c.abort(); abortErr != nil {
		u.mu.Lock()
		a.undecided = c
		u.mu.Unlock()
		go u.settle(a, c, before)
		return errors.Join(err, abortErr)
	}
	u.restorePIDFile(before)
	return err
}

// beginUpgrade enters the state upgrading.
func (u *Upgrader) beginUpgrade(caller context.Context) (*attempt, error) {
	a, refusal, answer := u.enterUpgrade(caller)
	if answer != nil {
		// The service manager may have asked for the upgrade, and wait.
		answer()
	}
	if refusal != nil {
		return nil, refusal
	}
	u.notifier.Reloading()
	return a, nil
}

// enterUpgrade returns an attempt, or why there is none, and how to answer the
// service manager.
func (u *Upgrader) enterUpgrade(caller context.Context) (a *attempt, refusal error, answer func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch u.state {
	case starting, accepting:
		return nil, ErrNotReady, nil
	case upgrading:
		if !u.attempt.answered {
			u.attempt.reloadAgain = true
			return nil, ErrUpgradeInProgress, nil
		}
		return nil, ErrUpgradeInProgress, u.answerReload
	case upgraded:
		return nil, ErrUpgraded, u.child.forwardReload
	case stopped:
		return nil, ErrStopped, nil
	}
	switch {
	case isClosed(u.stop):
		return nil, ErrStopped, nil
	case u.parent != nil && !u.parent.hasExited():
		refusal = ErrParentRunning
	case caller.Err() != nil:
		refusal = cancelled(caller)
	}
	if refusal != nil {
		return nil, refusal, func() {
			u.notifier.Reloading()
			u.notifier.ReloadFailed(refusal)
		}
	}

	a = &attempt{caller: caller, returned: make(chan struct{})}
	a.stopCtx, a.stop = context.WithCancelCause(context.WithoutCancel(caller))
	a.ctx, a.cancel = context.WithCancelCause(a.stopCtx)
	context.AfterFunc(caller, func() { a.cancel(cancelled(caller)) })
	u.attempt = a
	u.state = upgrading
	return a, nil, nil
}

func cancelled(caller context.Context) error {
	return fmt.Errorf("tableflip: upgrade cancelled: %w", context.Cause(caller))
}

// err returns why the attempt must end. Its ctx follows its caller's from a goroutine,
// which may not have run yet.
func (a *attempt) err() error {
	switch {
	case a.ctx.Err() != nil:
		return context.Cause(a.ctx)
	case a.caller.Err() != nil:
		return cancelled(a.caller)
	}
	return nil
}

// limit ends the attempt after timeout, unless its caller has a deadline, and returns
// when it will end.
func (a *attempt) limit(timeout time.Duration) time.Time {
	if deadline, ok := a.caller.Deadline(); ok {
		return deadline
	}
	timer := time.AfterFunc(timeout, func() {
		a.cancel(fmt.Errorf("tableflip: the new process was not ready after %v: %w", timeout, os.ErrDeadlineExceeded))
	})
	context.AfterFunc(a.ctx, func() { timer.Stop() })
	return time.Now().Add(timeout)
}

// startChild starts the new process.
func (u *Upgrader) startChild(a *attempt) (*child, error) {
	cmd, err := newCommand(u.command)
	if err != nil {
		return nil, err
	}
	// Whoever has cancelled the upgrade meanwhile may not want it started.
	if err := a.err(); err != nil {
		return nil, err
	}
	until := a.limit(u.upgradeTimeout)

	entries, files, release, err := u.registry.FreezeForChild()
	if err != nil {
		return nil, fmt.Errorf("%w%s", err, process.LimitHint(err))
	}
	defer release()
	if self, err := process.Open(os.Getpid()); err == nil {
		defer self.Close()
		entries = append(entries, &nametable.Entry{Name: parentHandle})
		files = append(files, self.File())
	}
	return startChild(cmd, u.managerEnv, entries, files, until)
}

// handOver puts a child in charge once it is ready. After an error it may be in charge
// all the same, until it was aborted.
func (u *Upgrader) handOver(a *attempt, c *child) error {
	if err := c.awaitReady(a.ctx); err != nil {
		if a.err() != nil {
			err = c.named(err)
		}
		return err
	}
	mainPID, err := u.notifier.PrepareMainPID()
	if err != nil {
		return fmt.Errorf("tableflip: prepare to tell the service manager: %w%s", err, process.LimitHint(err))
	}
	defer mainPID.Close()
	// From here on neither the caller nor the timeout can end the attempt.
	if err := a.err(); err != nil {
		return c.named(err)
	}
	if err := c.commit(a.stopCtx); err != nil {
		return err
	}
	u.retire(a, c, mainPID)
	return nil
}

// retire makes way for a child that is in charge.
func (u *Upgrader) retire(a *attempt, c *child, mainPID *systemd.MainPIDUpdate) {
	u.mu.Lock()
	a.answered = true
	again := a.reloadAgain
	u.mu.Unlock()
	if again {
		u.notifier.Reloading()
	}
	if mainPID.Notify(c.pid) {
		_ = c.say(wordNotified)
	}
	step.Reached(step.ManagerNotified)
	c.keep(u.logger)

	u.mu.Lock()
	wasStopped := u.state == stopped
	if !wasStopped {
		u.state = upgraded
		u.child = c
		close(u.exit)
	}
	u.mu.Unlock()
	if !wasStopped {
		u.registry.HandOver(ErrUpgraded)
	}
}

// endUpgrade leaves the state upgrading, unless the child is in charge or may still
// take charge.
func (u *Upgrader) endUpgrade(a *attempt, err error) {
	a.cancel(nil)
	u.mu.Lock()
	stays := u.state == upgrading && a.undecided == nil
	u.mu.Unlock()
	if stays {
		if err == nil {
			err = errors.New("tableflip: Options.Command has panicked")
		}
		u.stayInCharge(a, err)
	}
	close(a.returned)
}

// stayInCharge ends an attempt that has failed because of err.
func (u *Upgrader) stayInCharge(a *attempt, err error) {
	u.registry.Unfreeze()

	u.mu.Lock()
	a.answered = true
	again := a.reloadAgain
	u.mu.Unlock()
	if again {
		u.notifier.Reloading()
	}
	// While the state is upgrading, no other attempt can speak.
	u.notifier.ReloadFailed(err)

	u.mu.Lock()
	defer u.mu.Unlock()
	if u.state == upgrading {
		u.state = ready
		u.attempt = nil
	}
}

// settle waits for a child whose death could not be confirmed.
func (u *Upgrader) settle(a *attempt, c *child, before []byte) {
	<-a.returned
	if c.settle() {
		mainPID, err := u.notifier.PrepareMainPID()
		if err == nil {
			defer mainPID.Close()
		}
		u.retire(a, c, mainPID)
		return
	}
	u.mu.Lock()
	wasStopped := u.state == stopped
	u.mu.Unlock()
	if wasStopped {
		return
	}
	u.restorePIDFile(before)
	u.stayInCharge(a, errors.New("tableflip: the new process ended late"))
}

func (u *Upgrader) restorePIDFile(before []byte) {
	if err := u.pidFile.restore(before); err != nil && u.logger != nil {
		u.logger.Error("tableflip: can't restore the PID file", "error", err)
	}
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
	defer u.logs.Hold()()
	if !u.beginStop() {
		<-u.ended
		return
	}
	defer close(u.ended)

	u.mu.Lock()
	if u.state == upgraded {
		u.mu.Unlock()
		upgraderExists.Store(false)
		return
	}
	// A first generation that was never ready leaves what systemd has stored
	// for it over a crash to the one after it.
	inCharge := u.parent == nil && u.state != starting || u.parent != nil && u.parent.abandon()
	if u.state == upgrading {
		u.attempt.undecided.forget()
	}
	u.state = stopped
	u.mu.Unlock()

	if inCharge {
		u.notifier.Stopping()
	}
	u.registry.Stop(inCharge, ErrStopped)
	if inCharge {
		u.logCleanUp(u.pidFile.remove())
	}
	close(u.exit)
	upgraderExists.Store(false)
}

// beginStop returns once neither Ready nor Upgrade are at work, and can be no more. It
// reports whether no other Stop was called before.
func (u *Upgrader) beginStop() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	first := !isClosed(u.stop)
	if first {
		close(u.stop)
	}
	for {
		var busy <-chan struct{}
		switch {
		case u.state == accepting:
			busy = u.accepted
		case u.state == upgrading && !isClosed(u.attempt.returned):
			u.attempt.stop(ErrStopped)
			busy = u.attempt.returned
		default:
			return first
		}
		u.mu.Unlock()
		<-busy
		u.mu.Lock()
	}
}

func (u *Upgrader) logCleanUp(err error) {
	if err != nil && u.logger != nil {
		u.logger.Warn("tableflip: cleaning up", "error", err)
	}
}
