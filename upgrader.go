package tableflip

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/logqueue"
	"example.com/tableflip/internal/pidfile"
	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/queue"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/systemd"
	"example.com/tableflip/internal/trial"
)

// This file owns the states of an Upgrader and the transitions between them.

// DefaultUpgradeTimeout is how long a new process may take to become ready if
// Options.UpgradeTimeout is zero or negative.
const DefaultUpgradeTimeout = time.Minute

var (
	// ErrNotSupported is returned by New on platforms that cannot pass
	// listeners to another process: Windows, Plan 9, JavaScript and WASI.
	ErrNotSupported = fmt.Errorf("tableflip: platform does not support graceful restart: %w", errors.ErrUnsupported)

	// The texts of the five that follow are those of cloudflare/tableflip, whose
	// users compare them.

	// ErrNotReady is returned by Upgrade and Rehearse before Ready.
	ErrNotReady = errors.New("process is not ready yet")

	// ErrUpgradeInProgress is returned by Upgrade and Rehearse while another upgrade or
	// rehearsal is under way, on trial, and while a process drains whose trial was undone.
	ErrUpgradeInProgress = errors.New("upgrade in progress")

	// ErrParentRunning is returned by Upgrade and Rehearse while more earlier processes
	// drain than Options.MaxDraining allows.
	ErrParentRunning = errors.New("parent hasn't exited")

	// ErrUpgraded is returned by Upgrade and the methods of Fds once the process has
	// been replaced.
	ErrUpgraded = errors.New("already upgraded")

	// ErrStopped is returned by Ready, Upgrade and the methods of Fds after Stop, and once
	// the trial of this process was undone.
	ErrStopped = errors.New("terminating")
)

// Options are the options of New. The zero value is usable.
type Options struct {
	// UpgradeTimeout limits how long a new process may take to become ready before
	// it is killed. If zero or negative, [DefaultUpgradeTimeout] is used.
	UpgradeTimeout time.Duration

	// PIDFile, if not empty, is the path of a file that holds the PID of the
	// process in charge. Ready writes it, with mode 0644 less the umask. It
	// replaces the file at once, by renaming a temporary file in its directory, which
	// must be writable. A symbolic link is kept: what it leads to is replaced. A file
	// that is a mount of its own cannot be replaced, which is an error of Ready. A
	// failed upgrade restores the file with its mode, and Stop removes it, as does an
	// upgrade to a version that has another PIDFile. A relative path is relative to
	// the directory that the process started in.
	PIDFile string

	// ListenConfig creates the sockets of Listen and ListenPacket. If nil, the zero
	// ListenConfig is used. It is not applied to inherited sockets, which keep the
	// options that they were created with, except that its keep-alive parameters
	// also apply to inherited TCP listeners. Control is never called for an inherited
	// socket, because the parent serves with it.
	ListenConfig *net.ListenConfig

	// Command, if not nil, is called by every Upgrade to change how the new
	// process is started. The command is complete when it is called: the arguments
	// that this process was started with, its environment, descriptors 0 to 2 (the
	// null device for one that is closed, or closed on exec), the binary that argv[0]
	// named at the start, and the directory that this process started in, by the name
	// in PWD or, without that, by the part of an absolute argv[0] that names it.
	// Changes of os.Args, os.Stdin, os.Stdout and os.Stderr have no effect.
	//
	// Command may change anything but ExtraFiles. It may have a wrapper execute the
	// service, or start it in the background and exit, if the wrapper keeps
	// descriptors from 3 on, and environment variables, intact. A wrapper that
	// stays keeps the sockets open. Output must go to files, because this process
	// will not be there to copy it. A parent-death signal, a PID namespace of its own,
	// tracing and exec.CommandContext are refused, because the new process could not
	// outlive this one, or could not be found.
	//
	// The time that Command takes does not count against UpgradeTimeout. Command must
	// not wait for Stop, which waits for the upgrade.
	Command func(*exec.Cmd)

	// Compat lets an upgrade put a process in charge that uses cloudflare/tableflip
	// 1.2.3 instead of this package, so that a service can go back to a version from
	// before it moved over. Upgrade then returns nil as soon as that process says that it
	// is ready, because it acknowledges nothing. The package documentation says under
	// "Moving over" what else is different. The other direction needs no option.
	Compat bool

	// DescriptorStore has systemd store a copy of every listener and packet conn, so
	// that they outlive a crash: connections wait in their queues until Restart= has
	// started a new first generation, whose Listen returns the same sockets.
	// FileDescriptorStoreMax= in the unit must allow for as many. Stop and the Remove
	// methods have the copies closed, so that systemctl restart closes the sockets.
	DescriptorStore bool

	// MaxDraining is how many earlier generations may still drain when an upgrade begins.
	// If zero or negative, none may, and Upgrade returns ErrParentRunning at once.
	//
	// If positive, and more drain, the Hurry channel of the oldest is closed, and Upgrade
	// waits until enough have ended: until the deadline of its context or, if that has
	// none, for UpgradeTimeout, which begins again for the new process. Meanwhile this
	// process serves, and may add and remove descriptors. An earlier generation that runs a
	// version of this package without MaxDraining does not learn that it should hurry.
	//
	// After an upgrade, up to MaxDraining+1 generations drain. For what only one process can
	// have, see [Upgrader.WaitForParent].
	MaxDraining int

	// Trial is for how long a new process serves beside this one before it is put in charge.
	// If zero or negative, it is put in charge as soon as it is ready.
	//
	// A trial is for a new version that becomes ready and then fails. It begins when the new
	// process is ready, whose Ready then returns nil, and both accept from the same sockets.
	// This process stays in charge: it keeps the PID file, the files of Unix sockets and the
	// service manager's main PID. Upgrade returns nil once the new process is in charge.
	//
	// If the new process ends, or calls Stop or Fail, or the context of UpgradeContext ends,
	// or Stop is called in this process, the trial is undone. Upgrade returns an error, and
	// this process goes on. A new process that lives then has its Exit closed, is not
	// Replaced, and drains, so that nothing is lost. It does not count against MaxDraining.
	// The next upgrade waits for its end: until the deadline of its context or, without one,
	// for UpgradeTimeout, and then returns [ErrUpgradeInProgress]. If MaxDraining is positive,
	// its Hurry channel is closed for that. If it does not react in 10 seconds, it is killed.
	// If this process dies during a trial, the new one is in charge. A new process that hangs,
	// or answers with errors, passes its trial unless it finds that out and calls Fail, as
	// package service does if its Options.Healthy says so.
	//
	// The new process need not have the option. One with a version of this package, or with
	// another library, that does not know trials is put in charge at once, and the Logger
	// receives a warning. A rehearsal has no trial.
	//
	// During a trial, methods that add or remove descriptors of this process block. The new
	// process can't upgrade ([ErrUpgradeInProgress]), and has nothing for itself alone before
	// WaitForParent returns. What waits in the queues of sockets that the new process has
	// created itself, SO_REUSEPORT included, is lost if it is undone.
	//
	// Do not use a trial if old and new must not answer side by side: because a client's next
	// request, also on a new connection, may reach the other version; because the new one
	// changes data (a schema, a cache, files) so that the old one can't use it, which no
	// undoing brings back; or because only one process may write.
	Trial time.Duration

	// Logger, if not nil, receives the steps of upgrades, whose messages and attributes
	// the package documentation lists under "The log", and warnings: inherited
	// descriptors that nobody claimed, errors of cleaning up, a new process that dies
	// before the old one, and messages that the service manager did not receive. Its
	// handler may call methods of the Upgrader, because they log only when they return:
	// the steps of an upgrade arrive at its end, or when its trial begins, each with the time
	// at which it happened.
	// Exit is closed before, so a process that exits without waiting for Upgrade to
	// return loses these records.
	Logger *slog.Logger
}

// upgraderExists is true from a successful New to Stop.
var upgraderExists atomic.Bool

type state int

const (
	starting  state = iota // New has returned, Ready has not
	onTrial                // Ready has returned, and the parent is in charge
	accepting              // this process is taking charge
	ready                  // in charge
	upgrading              // in charge, with a child that is starting
	upgraded               // the child is in charge
	stopped
)

// An Upgrader replaces this process by a new one, and passes descriptors on to it. They
// are in its Fds, whose methods it has. All methods are safe for concurrent use.
type Upgrader struct {
	*Fds

	upgradeTimeout time.Duration
	maxDraining    int
	trial          time.Duration
	pidFile        pidfile.File
	command        func(*exec.Cmd)
	compat         bool
	logger         *slog.Logger    // nil for none
	logs           *logqueue.Queue // of logger, held by methods that its handler may call
	parent         *parent         // nil in the first generation
	number         int             // of this generation
	managerEnv     systemd.Env
	notifier       *systemd.Notifier // nil if nobody wants to be notified
	unsupervised   error             // why whoever watches would end the service with this process

	readyMu sync.Mutex    // held by Ready, so that concurrent calls return one result
	stop    chan struct{} // closed when Stop begins
	ended   chan struct{} // closed when Stop ends
	exit    chan struct{} // closed when the process is to drain and exit
	hurry   chan struct{} // closed when it should end soon

	// Under mu nothing blocks.
	mu        sync.Mutex
	state     state
	since     time.Time     // when this generation's State began
	accepted  chan struct{} // from accepting on: closed at its end
	attempt   *attempt      // while upgrading
	successor *Generation   // the child that is starting, or has taken charge, or was undone, while it lives
	undone    *child        // whose trial was undone, and that drains, while it lives
	child     *child        // once upgraded
}

// An attempt is an upgrade under way.
type attempt struct {
	caller   context.Context
	ctx      context.Context // ends when the attempt must, before the commit
	stopCtx  context.Context // ends when Stop is called
	cancel   context.CancelCauseFunc
	stop     context.CancelCauseFunc
	began    time.Time
	unfollow func() bool   // lets go of caller
	timer    *time.Timer   // ends the attempt unless the child is ready before, or nil
	returned chan struct{} // closed when Upgrade returns
	cause    string        // what ended it, as far as that is known
	hasChild bool          // which is the successor

	rehearsal bool
	rehearsed bool // with success

	// Guarded by Upgrader.mu:
	reloadAgain bool          // the manager asked for another reload meanwhile
	answered    bool          // the manager was told how it went
	undecided   chan struct{} // if its child may take charge after Upgrade has returned: closed once that is decided
}

// New returns the [Upgrader] for this process. It inherits descriptors from the parent
// process or, in the first generation, from systemd (LISTEN_FDS with a matching
// LISTEN_PID). It does not block.
//
// When the package is initialised, before New, it removes the variables from the
// environment and sets close-on-exec on the descriptors, so that no process that is
// started before New inherits them. A program that executes itself (syscall.Exec) before
// New therefore loses them, and New returns an error. Have Options.Command start what is
// to be executed instead.
//
// There is one Upgrader per process at a time: New may be called again after Stop, or
// after an error. A process that was replaced must not call New again for the same
// service. New returns [ErrNotSupported] where upgrades are not possible. If what a
// parent passed on is unreadable, or was lost on the way while the parent waits, New
// fails every time: the process should exit, which leaves the parent as it was.
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
		maxDraining:    max(opts.MaxDraining, 0),
		trial:          opts.Trial,
		pidFile:        pidfile.New(path),
		command:        opts.Command,
		compat:         opts.Compat,
		logger:         opts.Logger,
		logs:           logs,
		parent:         parent,
		managerEnv:     env,
		notifier:       notifier,
		stop:           make(chan struct{}),
		ended:          make(chan struct{}),
		exit:           make(chan struct{}),
		hurry:          make(chan struct{}),
		number:         1,
		since:          time.Now(),
	}
	if parent != nil {
		u.number = parent.generation.Number + 1
	}
	u.unsupervised = u.checkSupervision()
	if parent != nil {
		parent.listen(func(word string) { go u.heedAsked(word) }, u.noteEnd)
	}
	queue.OnKeep(u.keepUpgrade)
	return u, nil
}

// HasParent reports whether this process was started by an upgrade. That stays
// true when the parent has exited.
func (u *Upgrader) HasParent() bool {
	return u.parent != nil
}

// Exit returns a channel that is closed when the process should drain and exit:
// after a successful upgrade, by Stop, and if the trial of this process was undone.
func (u *Upgrader) Exit() <-chan struct{} {
	return u.exit
}

// Replaced reports whether a new process has taken this one's place. If Exit is closed
// and Replaced returns false, the process was stopped, or its trial was undone.
func (u *Upgrader) Replaced() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state == upgraded
}

// Hurry returns a channel that is closed when this process, which has been replaced and
// drains, should end soon: because an upgrade waits for its place (Options.MaxDraining), or
// because the process in charge has died without Stop. A supervisor such as systemd starts
// the service again only when no process of it is left. If the process in charge was
// stopped, the channel stays open, and this process may take its time. The same holds for a
// process that drains because its trial was undone.
func (u *Upgrader) Hurry() <-chan struct{} {
	return u.hurry
}

// A Generation is one process of the service.
type Generation struct {
	PID    int       // 0 if it has none here, because it is in another PID namespace
	Number int       // counted from the first generation, which is 1
	Since  time.Time // when State began, or zero if that is not known
	State  string    // "starting", "on trial", "in charge" or "draining"
}

// The states of a Generation.
const (
	stateStarting = "starting"  // Ready has not returned
	stateOnTrial  = "on trial"  // it serves, and its parent is in charge
	stateInCharge = "in charge" // it may be upgraded
	stateDraining = "draining"  // it was replaced or stopped, or its trial was undone
)

// attrs names a generation in the log.
func (g Generation) attrs() []slog.Attr {
	return []slog.Attr{slog.Int("pid", g.PID), slog.Int("generation", g.Number)}
}

// Generations returns the processes of the service that this one knows to live, oldest
// first: those before it until they have ended, the last of which is its parent, this
// process, and its child, from the start of an upgrade or rehearsal on. A process that has
// been replaced lists the process in charge in the place of its child. It does not block.
//
// Each process tells its child its Number. A parent with a version of this package that
// did not tell counts as generation 1, and its Since is zero while it is in charge.
func (u *Upgrader) Generations() []Generation {
	u.mu.Lock()
	defer u.mu.Unlock()
	var all []Generation
	for _, e := range u.earlierLocked() {
		all = append(all, e.generation)
	}
	all = append(all, u.selfLocked())
	if u.successor != nil {
		all = append(all, *u.successor)
	}
	return all
}

// earlierLocked returns the generations before this one that live, oldest first.
func (u *Upgrader) earlierLocked() []*elder {
	if u.parent == nil {
		return nil
	}
	earlier := slices.DeleteFunc(slices.Clone(u.parent.older), (*elder).hasEnded)
	// While Ready takes charge, it holds what hasExited asks for.
	if !isClosed(u.parent.exited) && (u.state == accepting || !u.parent.hasExited()) {
		earlier = append(earlier, &u.parent.elder)
	}
	return earlier
}

func (u *Upgrader) earlier() []*elder {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.earlierLocked()
}

// selfLocked returns what this process is.
func (u *Upgrader) selfLocked() Generation {
	self := Generation{PID: os.Getpid(), Number: u.number, Since: u.since, State: stateStarting}
	switch {
	case u.isOnTrialLocked():
		self.State = stateOnTrial
	case u.state == ready || u.state == upgrading:
		self.State = stateInCharge
	case u.state == upgraded || u.state == stopped:
		self.State = stateDraining
	}
	return self
}

// isOnTrialLocked reports whether this process serves, and is not in charge yet.
func (u *Upgrader) isOnTrialLocked() bool {
	return u.state == onTrial || u.state == accepting && u.parent != nil && u.parent.onTrial.Load()
}

// Ready reports that this process can serve. Every generation must call it once its
// listeners and everything else it needs exist. Accept from the listeners once Ready
// has returned nil: what a child accepts before is lost if its parent then refuses it,
// and what nobody accepts waits in the queue.
//
// In the first generation Ready writes the PID file, and tells the service manager, if
// there is one, that the service is up. In a child it blocks until the parent has
// decided, which takes no longer than the parent's UpgradeTimeout unless the parent is
// suspended. If the parent wants a trial (Options.Trial), Ready returns nil when that begins,
// and what is said next of the PID file and of descriptors is done once this process is in
// charge. If the parent refuses, Ready returns an error, and the process should
// exit without touching what it shares with the parent. If the parent has died, this
// process is in charge, and Ready returns nil. Before it returns nil, it writes the PID
// file, closes inherited descriptors that nobody claimed, and unlinks the files of
// those that are Unix sockets, except systemd's.
//
// Once Ready has returned nil, [Upgrader.Upgrade] is accepted (in a child: as far as
// Options.MaxDraining allows), and further calls return nil at once. Ready returns [ErrStopped]
// after Stop, and when Stop is called while it waits. If it could not write the PID file
// before it asked the parent, it can be called again.
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
		isTried, err := u.askParent()
		if err != nil {
			return err
		}
		if isTried {
			return u.beginTrial()
		}
	}
	return u.enterCharge()
}

// enterCharge leaves the states starting and onTrial, unless it returns an error.
func (u *Upgrader) enterCharge() error {
	u.mu.Lock()
	if isClosed(u.stop) {
		u.mu.Unlock()
		return ErrStopped
	}
	before := u.state
	u.state = accepting
	u.accepted = make(chan struct{})
	if u.parent != nil {
		for _, e := range u.parent.older { // whose watchers may not have run yet
			e.isTold = e.hasEnded()
		}
	}
	u.mu.Unlock()

	err := u.takeCharge()
	build := event.Build() // which takes a while, and is not for mu

	u.mu.Lock()
	defer u.mu.Unlock()
	u.state = before
	if err == nil {
		u.state, u.since = ready, time.Now()
		if u.parent != nil && u.parent.generation.State == stateInCharge {
			u.parent.generation.State, u.parent.generation.Since = stateDraining, u.since
		}
		// What is logged waits until Ready has returned.
		event.Publish(u.logger, slog.LevelInfo, event.InCharge, append(u.selfLocked().attrs(), build...)...)
	}
	close(u.accepted)
	return err
}

// askParent asks to be put in charge, and returns nil once the parent has done so, or
// has died, or wants a trial.
func (u *Upgrader) askParent() (isTried bool, err error) {
	if err := u.parent.abandonment(); err != nil {
		return false, err
	}
	if isClosed(u.parent.decided) && u.parent.refusal != nil {
		return false, u.parent.refusal
	}
	if err := u.pidFile.Prepare(); err != nil {
		return false, err
	}
	u.parent.sayReady()
	event.Build() // while the parent is at work, so that enterCharge need not wait for it

	select {
	case <-u.parent.decided:
	case <-u.parent.trial:
	case <-u.stop:
	}
	if isClosed(u.stop) {
		if u.parent.diedUndecided() {
			u.pidFile.Abandon() // which the parent would do
		}
		return false, ErrStopped
	}
	if !isClosed(u.parent.decided) {
		return true, nil
	}
	step.Reached(step.VerdictReceived)
	return false, u.parent.refusal
}

// beginTrial enters the state onTrial.
func (u *Upgrader) beginTrial() error {
	u.mu.Lock()
	if isClosed(u.stop) {
		u.mu.Unlock()
		return ErrStopped
	}
	u.parent.onTrial.Store(true)
	u.state, u.since = onTrial, time.Now()
	attrs := u.selfLocked().attrs()
	u.mu.Unlock()
	event.Publish(u.logger, slog.LevelInfo, event.OnTrial, attrs...)
	end := trial.Begin(u.undoTrial)
	step.Reached(step.OnTrial)
	go u.endTrial(end)
	return nil
}

// endTrial waits for the end of the trial that this process is on, and calls end when it
// is in charge, or has stopped. It holds no records back while it waits: a process on trial
// may crash, and a Fail that ends the trial logs before it returns.
func (u *Upgrader) endTrial(end func(undone bool)) {
	select {
	case <-u.parent.decided:
		step.Reached(step.VerdictReceived)
	case <-u.stop:
	}
	if !isClosed(u.stop) {
		defer u.logs.Hold()()
		if u.parent.refusal == nil && u.enterCharge() == nil {
			end(false)
			return
		}
	}
	u.stopFor(nil) // waits for another that has begun
	// An orphan that was stopped first was in charge.
	undone := u.parent.abandonment() != nil
	end(undone)
	if undone {
		go u.hurryUndone()
	}
}

// hurryUndone closes Hurry if the parent, which has undone the trial of this process, needs
// its place, or has died.
func (u *Upgrader) hurryUndone() {
	select {
	case <-u.parent.hurried:
	case <-u.parent.exited:
		if u.parent.stopped {
			return
		}
	}
	close(u.hurry)
}

// undoTrial does what stopFor does if this process is on trial, and otherwise nothing, which
// it reports.
func (u *Upgrader) undoTrial(why error) bool {
	defer u.logs.Hold()()
	u.mu.Lock()
	undoes := u.state == onTrial && !isClosed(u.stop) && !u.parent.diedUndecided()
	if undoes {
		close(u.stop)
	}
	u.mu.Unlock()
	if undoes {
		u.logFailure(why)
		u.endStop(why)
	}
	return undoes
}

// takeCharge makes this the process in charge. What it does after the
// acknowledgement cannot be undone.
func (u *Upgrader) takeCharge() error {
	// A later Upgrader of the same process needs no permission.
	asks := u.parent != nil && !u.parent.isInCharge()
	if asks {
		prepare := u.pidFile.Commit
		switch {
		case u.parent.isUpstream():
			prepare = u.prepareUnderUpstream
		case u.parent.onTrial.Load() && u.parent.diedUndecided():
			prepare = u.prepareAlone
		}
		if err := u.parent.takeCharge(prepare); err != nil {
			return err
		}
	} else {
		if err := u.pidFile.Write(); err != nil {
			return err
		}
	}
	u.registry.TakeCharge()

	if asks {
		go u.speak()
		go u.afterParent()
		return nil
	}
	u.registry.ForgetUnclaimed()
	u.notifier.Ready()
	u.registry.OpenStore()
	return nil
}

// prepareUnderUpstream also tells the service manager who takes charge: a parent with the
// other library does not, and may exit as soon as it hears of that.
func (u *Upgrader) prepareUnderUpstream() error {
	err := u.pidFile.Commit()
	if err == nil {
		u.notifyMainPID()
	}
	return err
}

// prepareAlone is for an orphan on trial: nobody else serves, and no Ready can return what
// went wrong.
func (u *Upgrader) prepareAlone() error {
	if err := u.pidFile.Commit(); err != nil && u.logger != nil {
		u.logger.Error("tableflip: the PID file names a process that has died", "error", err)
	}
	return nil
}

// speak tells the manager what it may know once it listens to this process: when the
// parent has told it of this process, or has ended.
func (u *Upgrader) speak() {
	if u.notifier == nil {
		return
	}
	select {
	case <-u.parent.notified:
	case <-u.parent.exited:
		if !isClosed(u.parent.notified) {
			u.notifyMainPID()
		}
	}
	u.registry.OpenStore()
}

// isHeard reports whether the manager listens to this process.
func (u *Upgrader) isHeard() bool {
	return u.notifier == nil || u.parent == nil || isClosed(u.parent.notified) || u.parent.hasExited()
}

// afterParent does what must wait until the parent's process has ended, and first tells
// the generations before the parent who has replaced it.
func (u *Upgrader) afterParent() {
	u.parent.sayInCharge(u.number)
	<-u.parent.exited
	u.registry.ForgetUnclaimed()
	u.noteEnd(&u.parent.elder)
	process.PIDNamespace() // which the next upgrade needs, and which takes a while
}

// noteEnd publishes the end of an earlier generation, unless the parent, which was still in
// charge, has.
func (u *Upgrader) noteEnd(e *elder) {
	u.mu.Lock()
	accepted, isTold := u.accepted, e.isTold
	u.mu.Unlock()
	if accepted == nil {
		return
	}
	if isTold {
		return
	}
	<-accepted // so that it is said first that this process is in charge
	u.mu.Lock()
	attrs, since := e.generation.attrs(), e.generation.Since
	u.mu.Unlock()
	event.Publish(u.logger, slog.LevelInfo, event.Ended, append(attrs, took(since))...)
}

// notifyMainPID is for a child whose parent died before it could notify the manager.
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

// refuseReload answers a reload that the service manager may have asked for.
func (u *Upgrader) refuseReload(err error) {
	u.notifier.Reloading()
	u.notifier.ReloadFailed(err)
}

// heedAsked is called when this process's parent, which it has replaced, was asked for a
// reload or an upgrade.
func (u *Upgrader) heedAsked(word string) {
	u.mu.Lock()
	child := u.child
	u.mu.Unlock()
	switch {
	case child != nil && word == wordUpgrade: // this process has been replaced, too
		child.forwardUpgrade()
	case child != nil:
		child.forwardReload()
	case word == wordUpgrade && queue.Ask(): // whoever heeds that sees to the answer
	default:
		u.answerReload()
	}
}

// keepUpgrade is called when an upgrade has to wait.
func (u *Upgrader) keepUpgrade() {
	u.mu.Lock()
	answer := func() {}
	switch {
	case u.state == upgrading && !u.attempt.answered:
		u.attempt.reloadAgain = true
	case u.state == upgrading, u.state == ready:
		answer = u.notifier.ReloadQueued
	case u.state == upgraded:
		answer = u.child.forwardUpgrade
	}
	u.mu.Unlock()
	answer()
}

// WaitForParent blocks until the processes of all earlier generations have ended, or ctx
// is done. Then this process has for itself what only one can have: locks, the only
// consumer of a queue, the only writer of a database. With Options.MaxDraining, Upgrade does
// not need that, and this process may be replaced before.
//
// If ctx is done first, the error wraps its cause. Without a parent WaitForParent returns
// nil at once. If the parent has refused this process, or its trial was undone, it returns an
// error. Call it after Ready, because the parent does not exit before.
func (u *Upgrader) WaitForParent(ctx context.Context) error {
	if u.parent == nil {
		return nil
	}
	if err := u.parent.wait(ctx); err != nil {
		return err
	}
	select {
	case <-trial.Ended(): // at once, now that the parent has ended
		return u.parent.abandonment()
	case <-ctx.Done():
		return fmt.Errorf("tableflip: wait for the end of the trial: %w", context.Cause(ctx))
	}
}

// Upgrade is [Upgrader.UpgradeContext] with [context.Background].
func (u *Upgrader) Upgrade() error {
	return u.UpgradeContext(context.Background())
}

// UpgradeContext starts a new process and blocks until it is in charge. Then Exit is
// closed, and this process should stop accepting, finish what it has begun, and exit.
//
// The new process has until the deadline of ctx, or for Options.UpgradeTimeout if ctx
// has none, to become ready. If there is a trial, it is on trial for Options.Trial then, and
// the end of ctx undoes that. Then it has 10 seconds to take charge, which it does at
// once unless it is suspended, and during which ctx no longer counts. If more earlier
// generations drain than Options.MaxDraining allows, or one whose trial was undone,
// UpgradeContext first waits for a place, as described there. If there is a service manager,
// UpgradeContext also waits, for at most six seconds, until the manager knows the new main
// process.
//
// After an error this process is in charge as before, the new one has been killed and
// reaped, or drains because its trial was undone, and UpgradeContext can be called again,
// unless the error is [ErrUpgraded] or [ErrStopped]. A new process that called Fail has had
// a second to exit by itself. If the death of the new process cannot be confirmed in a second,
// because it belongs to another user or the kernel does not let it go, the error says so.
// Until it has ended, or has taken charge after all, upgrades are refused with
// [ErrUpgradeInProgress], and methods that add or remove descriptors block.
//
// If its cause is one of the following, the error is or wraps it. Otherwise it says in
// words what the new process did.
//
//   - [ErrNotReady], [ErrUpgradeInProgress], [ErrParentRunning], ErrUpgraded or
//     ErrStopped, if that was the state, or Stop was called meanwhile;
//   - os.ErrDeadlineExceeded, if Options.UpgradeTimeout or the time to take charge has
//     passed, with ErrParentRunning also, if the time has passed in which there was no
//     place for another generation that drains, and with ErrUpgradeInProgress also, if a
//     process whose trial was undone has drained for all of it;
//   - the cause of ctx's end;
//   - an *exec.ExitError, if the new process exited with a failure, except under
//     systemd, whose child it is, and in a program that waits for all its children
//     itself;
//   - what os/exec returned, for example os.ErrNotExist, if it could not be
//     started.
func (u *Upgrader) UpgradeContext(ctx context.Context) error {
	return u.upgrade(ctx, false)
}

// Rehearse tells whether an upgrade would succeed. It does what UpgradeContext does until
// the new process is ready. Then it returns nil, and this process is in charge as
// before: the new process was told to leave, and was killed if it had not exited a
// second later. The errors are those of UpgradeContext, and ctx, Options.UpgradeTimeout
// and the states in which an upgrade is refused mean the same. Until a rehearsal ends,
// upgrades are refused with [ErrUpgradeInProgress], and methods that add or remove
// descriptors block. Stop ends it.
//
// The service manager is told nothing, and no file is touched but PIDFile with ".tmp"
// added. What the set-up of the new version does is done: a new Unix socket's file goes
// if the new process calls Stop, and a database that it has changed stays changed. Its
// Ready returns an error that says that this was a rehearsal. What it accepts before it
// calls Ready is lost, and so is what waits in the queues of further SO_REUSEPORT sockets
// that it creates: see the limits of [Fds].
//
// After a rehearsal no process more drains, so that it needs no place and has nobody hurry
// if Options.MaxDraining is positive.
//
// If this process dies after the new one was ready, the new one takes charge.
func (u *Upgrader) Rehearse(ctx context.Context) error {
	return u.upgrade(ctx, true)
}

func (u *Upgrader) upgrade(ctx context.Context, rehearsal bool) (err error) {
	defer u.logs.Hold()()
	a, err := u.beginUpgrade(ctx, rehearsal)
	if err != nil {
		return err
	}
	defer func() { u.endUpgrade(a, err) }()
	if err := u.awaitPlace(a); err != nil {
		return err
	}

	before, err := u.pidFile.Read()
	if err != nil {
		return err
	}
	c, err := u.startChild(a)
	if err != nil {
		return err
	}
	if rehearsal {
		err = u.rehearse(a, c)
	} else if err = u.handOver(a, c); err == nil {
		return nil
	}

	if c.undo() {
		u.restorePIDFile(before)
		u.mu.Lock()
		u.undone = c
		u.successor.State, u.successor.Since = stateDraining, time.Now()
		u.mu.Unlock()
		go u.loseUndone(a, c)
		return err
	}
	if abortErr := c.abort(); abortErr != nil {
		u.mu.Lock()
		a.undecided = make(chan struct{})
		u.mu.Unlock()
		go u.settle(a, c, before)
		return fmt.Errorf("%w\n%v", err, abortErr) // which is not why the upgrade has failed
	}
	u.restorePIDFile(before)
	return err
}

// beginUpgrade enters the state upgrading.
func (u *Upgrader) beginUpgrade(caller context.Context, rehearsal bool) (*attempt, error) {
	a, answer, refusal := u.enterUpgrade(caller, rehearsal)
	if answer != nil && !rehearsal {
		// The service manager may have asked for the upgrade, and wait.
		answer()
	}
	if refusal != nil {
		// Not logged, because a handler that upgrades would log without end.
		event.Publish(nil, slog.LevelWarn, event.Refused, slog.Any("error", refusal))
		return nil, refusal
	}
	return a, nil
}

// enterUpgrade returns an attempt, or how to answer the service manager and why there
// is none.
func (u *Upgrader) enterUpgrade(caller context.Context, rehearsal bool) (a *attempt, answer func(), refusal error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.isOnTrialLocked() {
		return nil, nil, ErrUpgradeInProgress // the parent's, which answers its manager
	}
	switch u.state {
	case starting, accepting:
		return nil, nil, ErrNotReady
	case upgrading:
		switch {
		case u.attempt.rehearsal && u.attempt.undecided == nil:
			return nil, func() { u.refuseReload(ErrUpgradeInProgress) }, ErrUpgradeInProgress
		case !u.attempt.answered:
			u.attempt.reloadAgain = u.attempt.reloadAgain || !rehearsal
			return nil, nil, ErrUpgradeInProgress
		}
		return nil, u.answerReload, ErrUpgradeInProgress
	case upgraded:
		return nil, u.child.forwardReload, ErrUpgraded
	}
	switch {
	case isClosed(u.stop):
		return nil, nil, ErrStopped
	case u.maxDraining == 0 && len(u.earlierLocked()) > 0:
		refusal = ErrParentRunning
	case caller.Err() != nil:
		refusal = cancelled(caller)
	default:
		refusal = u.unsupervised
	}
	if refusal == ErrParentRunning && queue.IsKept(caller) {
		return nil, u.notifier.ReloadQueued, refusal
	}
	if refusal != nil {
		return nil, func() { u.refuseReload(refusal) }, refusal
	}

	a = &attempt{caller: caller, began: time.Now(), rehearsal: rehearsal, returned: make(chan struct{})}
	a.answered = rehearsal // which the manager has not asked for
	a.stopCtx, a.stop = context.WithCancelCause(context.WithoutCancel(caller))
	a.ctx, a.cancel = context.WithCancelCause(a.stopCtx)
	a.unfollow = context.AfterFunc(caller, func() { a.cancel(cancelled(caller)) })
	u.attempt = a
	u.state = upgrading
	return a, nil, nil
}

// awaitPlace returns once the manager listens to this process, and no more earlier
// generations drain than may. A rehearsal, after which no generation more drains, needs no
// place.
func (u *Upgrader) awaitPlace(a *attempt) error {
	// Mostly nobody has to wait, and no timer is needed.
	ctx := sync.OnceValue(func() context.Context {
		if _, ok := a.caller.Deadline(); ok {
			return a.ctx
		}
		limited, cancel := context.WithTimeoutCause(a.ctx, u.upgradeTimeout, os.ErrDeadlineExceeded)
		context.AfterFunc(a.ctx, cancel)
		return limited
	})
	err := u.await(ctx, u.isHeard, "have not told the service manager that this process is in charge")
	if err != nil {
		return err
	}
	if !a.rehearsal {
		u.notifier.Reloading()
	}
	if err := u.awaitUndone(ctx); err != nil || a.rehearsal {
		return err
	}
	return u.await(ctx, u.hasPlace, "still drain")
}

// awaitUndone returns once the child whose trial was undone, if there was one, has ended.
func (u *Upgrader) awaitUndone(ctx func() context.Context) error {
	u.mu.Lock()
	c := u.undone
	u.mu.Unlock()
	if c == nil {
		return nil
	}
	if u.maxDraining > 0 {
		c.hurry()
	}
	step.Reached(step.UndoneAwaited)
	select {
	case <-c.ended:
		return nil
	case <-ctx().Done():
	}
	err, timedOut := timeout(ctx())
	if timedOut {
		err = fmt.Errorf("%w: process %d, whose trial was undone, still drains: %w", ErrUpgradeInProgress, c.pid, err)
	}
	return err
}

// loseUndone waits for the end of a child whose trial was undone.
func (u *Upgrader) loseUndone(a *attempt, c *child) {
	<-a.returned
	c.awaitEnd()
	u.mu.Lock()
	attrs := append(u.successor.attrs(), took(u.successor.Since))
	u.undone, u.successor = nil, nil
	u.mu.Unlock()
	event.Publish(u.logger, slog.LevelInfo, event.Ended, attrs...)
	close(c.ended)
}

// await returns once a condition holds that depends on earlier generations. If there is no
// more time, its error says what they did not do.
func (u *Upgrader) await(ctx func() context.Context, condition func() bool, they string) error {
	for !condition() {
		select {
		case <-u.parent.changed:
			continue
		case <-ctx().Done():
		}
		err, timedOut := timeout(ctx())
		if !timedOut {
			return err
		}
		var pids []int
		for _, e := range u.earlier() {
			pids = append(pids, e.generation.PID)
		}
		return fmt.Errorf("%w: the processes %v %s: %w", ErrParentRunning, pids, they, err)
	}
	return nil
}

// timeout returns the cause of ctx's end, and whether that is the time.
func timeout(ctx context.Context) (cause error, timedOut bool) {
	switch err := context.Cause(ctx); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return err, true
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w (%w)", os.ErrDeadlineExceeded, err), true
	default:
		return err, false
	}
}

// hasPlace reports whether no more earlier generations drain than may. If more do, it
// hurries the oldest.
func (u *Upgrader) hasPlace() bool {
	earlier := u.earlier()
	tooMany := max(len(earlier)-u.maxDraining, 0)
	for _, e := range earlier[:tooMany] {
		e.hurry()
	}
	return tooMany == 0
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

// until returns when the attempt must have a child that is ready: timeout from now, unless
// its caller has a deadline.
func (a *attempt) until(timeout time.Duration) time.Time {
	if deadline, ok := a.caller.Deadline(); ok {
		return deadline
	}
	return time.Now().Add(timeout)
}

// limit ends the attempt at that time, of which the timeout is over then, unless its
// caller has a deadline.
func (a *attempt) limit(until time.Time, timeout time.Duration) {
	if _, ok := a.caller.Deadline(); ok {
		return
	}
	a.timer = time.AfterFunc(time.Until(until), func() {
		a.cancel(fmt.Errorf("tableflip: the new process was not ready after %v: %w", timeout, os.ErrDeadlineExceeded))
	})
}

// handOver puts a child in charge once it is ready. After an error it may be in charge
// all the same, until it was aborted.
func (u *Upgrader) handOver(a *attempt, c *child) error {
	mainPID, err := u.prepareHandOver(a, c)
	if err != nil {
		return err
	}
	defer mainPID.Close()
	if err := c.commit(a.stopCtx); err != nil {
		a.cause = cmp.Or(c.cause, causeChild)
		return err
	}
	u.retire(a, c, mainPID)
	return nil
}

// rehearse finds out whether a child can be put in charge, and then has it leave.
func (u *Upgrader) rehearse(a *attempt, c *child) error {
	mainPID, err := u.prepareHandOver(a, c)
	if err == nil {
		mainPID.Close()
		if err = c.checkAlive(a.stopCtx); err != nil {
			a.cause = cmp.Or(c.cause, causeChild)
		}
	}
	a.rehearsed = err == nil
	c.dismiss()
	return err
}

// tryOut has the child serve beside this process for the time of a trial, if there is one.
func (u *Upgrader) tryOut(a *attempt, c *child) error {
	if u.trial <= 0 || a.rehearsal {
		return nil
	}
	if !c.knowsTrials() {
		if u.logger != nil {
			u.logger.Warn("tableflip: the new version does not know trials, and is put in charge at once", "pid", c.pid)
		}
		return nil
	}
	if a.timer != nil {
		a.timer.Stop()
	}
	if err := a.err(); err != nil {
		return err
	}
	u.mu.Lock()
	u.successor.State, u.successor.Since = stateOnTrial, time.Now()
	u.mu.Unlock()
	u.tell(a, slog.LevelInfo, event.OnTrial)
	ctx, cancel := context.WithCancel(context.Background())
	var telling sync.WaitGroup
	telling.Go(func() { u.notifier.OnTrial(ctx, c.pid, u.trial, trialPatience) })
	defer telling.Wait() // the answer comes next
	defer cancel()
	// It can take hours, and this process can crash meanwhile.
	defer u.logs.Pause()()
	return c.tryOut(a.ctx, min(u.trial, step.MaxTrial))
}

// trialPatience is longer than what follows a trial until the service manager has an answer.
const trialPatience = time.Minute

// prepareHandOver returns once nothing but the commit is missing.
func (u *Upgrader) prepareHandOver(a *attempt, c *child) (*systemd.MainPIDUpdate, error) {
	err := c.awaitReady(a.ctx)
	if err == nil {
		u.tell(a, slog.LevelInfo, event.Ready)
		err = u.tryOut(a, c)
	}
	if err != nil {
		a.cause = cmp.Or(c.cause, causeChild)
		if a.err() != nil {
			err = c.named(err)
		}
		return nil, err
	}
	mainPID, err := u.notifier.PrepareMainPID()
	if err != nil {
		return nil, fmt.Errorf("tableflip: prepare to tell the service manager: %w%s", err, process.LimitHint(err))
	}
	if supervisor := u.managerEnv.Supervisor(); supervisor != 0 && isAncestor(supervisor) && !mainPID.IsReachable() {
		mainPID.Close()
		return nil, fmt.Errorf("tableflip: the supervisor, %d, would end the service with this process, because it can't be told of the new one: "+
			"its NOTIFY_SOCKET is not in the environment, or is in another network namespace", supervisor)
	}
	// From here on neither the caller nor the timeout can end the attempt.
	if err := a.err(); err != nil {
		mainPID.Close()
		return nil, c.named(err)
	}
	return mainPID, nil
}

// retire makes way for a child that is in charge.
func (u *Upgrader) retire(a *attempt, c *child, mainPID *systemd.MainPIDUpdate) {
	u.mu.Lock()
	u.successor.State, u.successor.Since = stateInCharge, time.Now()
	u.mu.Unlock()
	u.tell(a, slog.LevelInfo, event.Committed, took(a.began))

	u.beginAnswer(a)
	if mainPID.Notify(c.pid) {
		_ = c.say(wordNotified)
	}
	step.Reached(step.ManagerNotified)
	u.logCleanUp(u.pidFile.Remove()) // if the new process has another one
	c.keep(u.logger)
	u.leaveEarlier(c)

	u.mu.Lock()
	u.state, u.since = upgraded, time.Now()
	u.child = c
	close(u.exit)
	u.mu.Unlock()
	u.registry.HandOver(ErrUpgraded)
	u.tellDraining(true)
	go u.outlive(c)
}

// leaveEarlier has a child that is in charge speak to the earlier generations in this
// process's place: if that dies, they must know, and not if this one does. If the child
// can't, the end of this process must not mean anything to them.
func (u *Upgrader) leaveEarlier(c *child) {
	for _, e := range u.earlier() {
		if c.speaksToEarlier() {
			e.hangUp()
		} else {
			_ = e.say(wordStopping)
		}
	}
}

// outlive waits until a child that is in charge, and all that came after it, have ended,
// and obeys them until then.
func (u *Upgrader) outlive(c *child) {
	hurry := sync.OnceFunc(func() { close(u.hurry) })
	wasStopped := c.hearSuccessors(func(words []string) {
		switch {
		case words[0] == wordHurry:
			hurry()
		case words[0] == wordSucceeded && len(words) > 2:
			u.followSuccessor(words[1], words[2])
		}
	})
	if !wasStopped {
		hurry()
		for _, e := range u.earlier() { // which no other tells
			e.hurry()
		}
	}
	u.loseSuccessor()
}

// followSuccessor notes that a generation after the child is in charge.
func (u *Upgrader) followSuccessor(pid, number string) {
	g := Generation{Since: time.Now(), State: stateInCharge}
	g.PID, _ = strconv.Atoi(pid)
	g.Number, _ = strconv.Atoi(number)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.successor = &g
}

// loseSuccessor is called when the process in charge has ended before this one.
func (u *Upgrader) loseSuccessor() {
	u.mu.Lock()
	attrs := u.successor.attrs()
	u.successor = nil
	u.mu.Unlock()
	event.Publish(u.logger, slog.LevelInfo, event.Ended, attrs...)
}

// tellDraining publishes that this process has been in charge.
func (u *Upgrader) tellDraining(replaced bool) {
	u.mu.Lock()
	attrs := append(u.selfLocked().attrs(), slog.Bool("replaced", replaced))
	u.mu.Unlock()
	event.Publish(u.logger, slog.LevelInfo, event.Draining, attrs...)
}

// tell publishes a step of an attempt.
func (u *Upgrader) tell(a *attempt, level slog.Level, name string, attrs ...slog.Attr) {
	if a.hasChild {
		u.mu.Lock()
		attrs = append(u.successor.attrs(), attrs...)
		u.mu.Unlock()
	}
	if a.rehearsal {
		attrs = append(attrs, slog.Bool("rehearsal", true))
	}
	event.Publish(u.logger, level, name, attrs...)
}

func took(since time.Time) slog.Attr { return slog.Duration("took", time.Since(since)) }

// endUpgrade leaves the state upgrading, unless the child is in charge or may still
// take charge.
func (u *Upgrader) endUpgrade(a *attempt, err error) {
	a.unfollow()
	if a.timer != nil {
		a.timer.Stop()
	}
	u.mu.Lock()
	failed, undecided := u.state == upgrading, a.undecided != nil
	u.mu.Unlock()
	switch {
	case !failed:
	case err == nil && a.rehearsed:
		u.tell(a, slog.LevelInfo, event.Rehearsed, took(a.began))
	default:
		err = cmp.Or(err, errors.New("tableflip: Options.Command has panicked"))
		u.tell(a, slog.LevelError, event.Failed, slog.Any("error", err), slog.String("cause", a.failure(err)), took(a.began))
	}
	if !undecided {
		a.stop(nil)
	}
	switch {
	case !failed:
	case undecided: // the manager does not wait for the child's death
		u.answer(a, err)
	default:
		u.stayInCharge(a, err)
	}
	close(a.returned)
}

// What ends an attempt, beside its caller, Stop and the time.
const (
	causeReason = "reason" // the new process said why it can't take charge
	causeChild  = "child"  // the new process exited, or did what it must not
	causeParent = "parent" // this process could not start it, or could not hand over
)

// failure returns the cause of err in a word.
func (a *attempt) failure(err error) string {
	switch {
	case errors.Is(err, ErrStopped):
		return "stopped"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case errors.Is(err, context.Cause(a.caller)):
		return "cancelled"
	}
	return cmp.Or(a.cause, causeParent)
}

// stayInCharge ends an attempt that has failed because of err.
func (u *Upgrader) stayInCharge(a *attempt, err error) {
	u.registry.Unfreeze()
	// While the state is upgrading, no other attempt can speak.
	u.answer(a, err)

	u.mu.Lock()
	defer u.mu.Unlock()
	u.state = ready
	u.attempt = nil
	if u.undone == nil {
		u.successor = nil
	}
}

// settle waits for a child whose death could not be confirmed, no longer than until Stop
// is called.
func (u *Upgrader) settle(a *attempt, c *child, before *pidfile.Content) {
	<-a.returned
	inCharge := c.settle(a.stopCtx)
	// Released last: a handler may call Stop, which waits for the decision.
	defer u.logs.Hold()()
	defer close(a.undecided)
	defer a.stop(nil)
	if inCharge {
		mainPID, _ := u.notifier.PrepareMainPID()
		defer mainPID.Close()
		u.retire(a, c, mainPID)
		return
	}
	u.restorePIDFile(before)
	u.stayInCharge(a, cmp.Or(context.Cause(a.stopCtx), errors.New("tableflip: the new process ended late")))
}

// answer tells the manager, if it listens, that an attempt has failed.
func (u *Upgrader) answer(a *attempt, err error) {
	if !a.rehearsal && u.isHeard() {
		u.beginAnswer(a)
		u.notifier.ReloadFailed(err)
	}
}

// beginAnswer is called before the manager is told how an attempt went, which answers
// all reloads that it has asked for.
func (u *Upgrader) beginAnswer(a *attempt) {
	u.mu.Lock()
	a.answered = true
	again := a.reloadAgain
	a.reloadAgain = false
	u.mu.Unlock()
	if again {
		u.notifier.Reloading()
	}
}

func (u *Upgrader) restorePIDFile(before *pidfile.Content) {
	if err := u.pidFile.Restore(before); err != nil && u.logger != nil {
		u.logger.Error("tableflip: can't restore the PID file", "error", err)
	}
}

// Stop ends what the Upgrader does: it aborts an upgrade under way, closes what
// the registry holds, and lets New be called again. A process in charge also
// unlinks all Unix sockets of the registry, removes the PID file if it still
// names this process, and tells the service manager that the service stops. A process
// that was never put in charge unlinks only the sockets that it created itself. During a
// trial, Stop undoes it, in either process. After a successful upgrade there is nothing to do.
//
// When Stop returns, all of this is done and Exit is closed. It blocks while a new
// process that is starting is killed, or until the service manager knows the process that
// has just taken charge. Both take a few seconds at most, except that a process on trial that
// does not react is killed after 10 seconds.
func (u *Upgrader) Stop() {
	defer u.logs.Hold()()
	u.stopFor(nil)
}

// stopFor stops because of an error, which may be nil.
func (u *Upgrader) stopFor(why error) {
	if u.beginStop() {
		u.endStop(why)
	}
	<-u.ended
}

// endStop does what must be done once.
func (u *Upgrader) endStop(why error) {
	defer close(u.ended)
	u.mu.Lock()
	if u.state == upgraded {
		u.mu.Unlock()
		upgraderExists.Store(false)
		return
	}
	// A first generation that was never ready leaves what systemd has stored
	// for it over a crash to the one after it.
	inCharge := u.parent == nil && u.state != starting || u.parent != nil && u.parent.abandon(why)
	wasTried, undone := u.state == onTrial, u.undone
	wasReady := u.state != starting
	u.state, u.since = stopped, time.Now()
	u.mu.Unlock()

	if wasTried {
		u.pidFile.Abandon() // which is not the parent's if that has died, or has another path
	}
	if undone != nil {
		_ = undone.say(wordStopping)
	}
	if inCharge || wasTried {
		u.tellDraining(false)
	}
	if inCharge {
		u.notifier.Stopping()
		for _, e := range u.earlier() {
			_ = e.say(wordStopping)
		}
	}
	u.registry.Stop(inCharge, ErrStopped)
	if wasReady { // or Ready may be at work on the file
		u.logCleanUp(u.pidFile.Remove())
	}
	close(u.exit)
	upgraderExists.Store(false)
}

// Fail is [Upgrader.Stop] for a process that cannot serve, and says why. Call it in the
// place of Stop if the set-up of a new version fails, and exit with a status that is not
// zero.
//
// Before this process is in charge, the parent's Upgrade returns an error with the
// text of err, and the parent's Logger and service manager get it, too. The parent
// gives this process a second to exit before it kills it, or the time to drain if it was on
// trial. The text is cut to a line of
// 1,000 bytes. In a process that is in charge, and in the first generation, Fail is Stop.
// In all of them the Logger receives err, as an error.
func (u *Upgrader) Fail(err error) {
	defer u.logs.Hold()()
	err = cmp.Or(err, errors.New("it gave no reason"))
	u.logFailure(err)
	u.stopFor(err)
}

func (u *Upgrader) logFailure(err error) {
	if err != nil && u.logger != nil {
		u.logger.Error("tableflip: this process stops because it has failed", "error", err)
	}
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
		case u.state == upgrading:
			u.attempt.stop(ErrStopped)
			if busy = u.attempt.returned; isClosed(busy) {
				busy = u.attempt.undecided
			}
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
