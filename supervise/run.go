//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise

import (
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file owns the processes: which one is the main one, who waits for them, and
// which signals they get. One goroutine does all of it.

const supported = true

// supervisorVariable holds the supervisor's PID in all processes of the service.
const supervisorVariable = "TABLEFLIP_SUPERVISOR"

// hurryTimeout is how long this process waits for older generations if the main process
// has ended unasked. The service is down then, and whoever watches this process starts the
// service again only after its end. The time is for requests that are nearly answered,
// because the end of this process may be the end of older generations, too (process 1,
// KillMode=mixed). Tests make it shorter.
var hurryTimeout = time.Second

// These bounds keep the service from making this process grow, or be busy, for ever.
const (
	maxMessages = 1024 // in a row, before anything else is done; no queue is as long by default
	maxClaims   = 16
)

// ignoredInterval is how often messages that were ignored are logged, at the most.
const ignoredInterval = time.Minute

// killTimeout is how long processes may take to die of SIGKILL. The kernel may not
// let them, for example while a disk does not answer. Tests make it shorter.
var killTimeout = 5 * time.Second

var (
	forwarded = []os.Signal{unix.SIGHUP, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGCONT, unix.SIGTSTP}
	stopping  = []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGQUIT}
	lasting   = append([]unix.Signal{unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2}, stopping...)
)

type phase int

const (
	running   phase = iota // there is a main process
	abandoned              // it died during an upgrade: its child may take over
	ending                 // it has ended: what is left may end by itself
	killing                // it took too long
	ended
)

// A supervision is the state of Run.
type supervision struct {
	Supervisor
	log      *journal
	notify   *notifySocket
	outer    *outer
	terminal *terminal

	phase    phase
	deadline <-chan time.Time // of the phase

	main   int              // the main process, or the last one
	group  int              // its process group
	status *unix.WaitStatus // its, nil while it is not known
	watch  *watch           // of it, nil if none is needed or possible
	gone   <-chan struct{}  // closed when watch has seen its end

	former    map[int]bool            // main processes of the past
	reaped    map[int]unix.WaitStatus // by the last call of reap
	children  bool                    // there are more
	notReaper bool                    // orphans become children of another process
	poll      <-chan time.Time        // where what is no child cannot be watched

	upgrading     bool          // the main process said so
	saidStop      bool          // and that
	toldStop      bool          // a signal to stop was passed on to it
	duringUpgrade []unix.Signal // that it got meanwhile
	held          []unix.Signal // for the main process to come
	claims        []message     // of orphans to be it, while the old one seems to live

	unasked bool             // the main process has ended without having been told to
	hurry   <-chan time.Time // when older generations no longer delay the end
	hurried bool

	ignored       map[string]int // messages, by the reason, since the last log of them
	ignoredLogged time.Time
}

func (s Supervisor) run(path string, self bool) (int, error) {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	defer signal.Stop(children)
	// The reader of the log may end. That must not end this process.
	broken := make(chan os.Signal, 1)
	signal.Notify(broken, unix.SIGPIPE)
	defer signal.Stop(broken)

	notify, err := openNotifySocket()
	if err != nil {
		return 0, err
	}
	defer notify.close()
	log := openJournal(s.Logger.Handler())
	defer log.close()
	outer := openOuter(log)
	defer outer.close()
	v := &supervision{
		Supervisor: s,
		log:        log,
		notify:     notify,
		outer:      outer,
		terminal:   openTerminal(),
		former:     map[int]bool{},
		ignored:    map[string]int{},
	}
	if os.Getpid() != 1 {
		if err := setReaper(true); err != nil {
			log.warn("not the parent of orphans: exit statuses of later generations are lost", "error", err)
			v.notReaper, v.poll = true, time.Tick(time.Second)
		}
	}
	if err := v.startService(path, self); err != nil {
		v.terminal.leave()
		_ = setReaper(false) // Self's caller may go on
		return 0, err
	}
	for v.phase != ended {
		select {
		case sig := <-signals:
			// First, so that it does not go to a process that has been replaced.
			v.catchUp()
			v.forward(sig.(unix.Signal))
			continue
		case <-v.deadline:
			v.expire()
		case <-children:
		case <-v.notify.arrived:
		case <-v.gone:
			v.gone = nil
		case <-v.poll:
		case <-v.hurry:
			v.hurry, v.hurried = nil, true
			// No event announces the end of processes that older generations have started.
			v.poll = time.Tick(100 * time.Millisecond)
		}
		v.catchUp()
	}
	v.logIgnored()
	status := v.exitStatus()
	log.info("ended", "pid", v.main, "status", status)
	return status, nil
}

func (v *supervision) startService(path string, self bool) error {
	env := slices.DeleteFunc(os.Environ(), func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		// Without them, WATCHDOG_USEC and LISTEN_PID are all that counts, see
		// sd_watchdog_enabled(3) and sd_listen_fds(3).
		return slices.Contains([]string{"NOTIFY_SOCKET", "WATCHDOG_PID", "LISTEN_PIDFDID", supervisorVariable, shimVariable}, name)
	})
	env = append(env, "NOTIFY_SOCKET="+v.notify.address, fmt.Sprint(supervisorVariable, "=", os.Getpid()))
	activated := os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid())
	program := path
	if activated && !self {
		own, err := ownProgram()
		if err != nil {
			return fmt.Errorf("find this program, which passes on the sockets of LISTEN_FDS: %w", err)
		}
		program, env = own, append(env, shimVariable+"="+path)
	}
	pid, err := syscall.ForkExec(program, v.Command, &syscall.ProcAttr{
		Env:   env,
		Files: []uintptr{0, 1, 2},
		Sys:   v.terminal.attributes(),
	})
	if err != nil {
		return fmt.Errorf("%w: %s: %w", errNotStarted, path, err)
	}
	if activated {
		// Else the sockets would stay open when the service has closed them.
		n, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
		for fd := 3; fd < 3+n; fd++ {
			unix.Close(fd)
		}
	}
	v.main, v.group = pid, pid
	v.terminal.follow(v.group)
	v.log.info("started", "pid", pid, "command", strings.Join(v.Command, " "))
	return nil
}

// catchUp handles all that has happened since the last call. It reaps children first:
// then all messages that they sent before they died have arrived, and those count although
// the senders have died.
func (v *supervision) catchUp() {
	v.reap()
	for range maxMessages {
		m, ok := v.notify.receive()
		if !ok {
			break
		}
		v.heed(m)
		m.close()
	}
	switch v.phase {
	case running:
		for v.phase == running && v.mainEnded() {
			v.lost()
		}
	case abandoned:
		if !v.maySucceed() {
			v.log.warn("nobody is left that could take over")
			v.end()
		}
	case ending, killing:
		switch {
		case !v.anyLeft():
			v.phase = ended
		case v.hurried && !v.strayLeft():
			v.log.warn("not waiting for older generations")
			v.phase = ended
		case v.phase == killing:
			// Processes that those killed before had just started.
			v.signalLeft(unix.SIGKILL, v.spared())
		}
	}
}

func (v *supervision) reap() {
	v.reaped = map[int]unix.WaitStatus{}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG|unix.WUNTRACED, nil)
		if pid <= 0 {
			v.children = err == nil
			break
		}
		if status.Stopped() {
			v.terminal.stopped(pid, status.StopSignal())
			continue
		}
		v.reaped[pid] = status
		delete(v.former, pid)
		if pid == v.main {
			v.status = &status
		}
	}
}

// exists reports whether the process is the service's, and lives or has been reaped
// just now.
func (v *supervision) exists(pid int) bool {
	_, reaped := v.reaped[pid]
	return reaped || pid > 1 && pid != os.Getpid() && isDescendant(pid)
}

// heed obeys a message. A message that is not from the main process counts only if it names
// a new main process. systemd ignores others, too.
func (v *supervision) heed(m message) {
	switch {
	case !v.fromService(m):
		v.ignore("from strangers")
		return
	case m.truncated: // as systemd does
		v.ignore("too long")
		return
	}
	fromMain := !tellsSender || m.pid == v.main
	if value := m.field("MAINPID"); value != "" {
		if v.phase > abandoned {
			v.log.warn("ignored MAINPID, which comes too late", "value", value)
			return
		}
		pid, watch, ok := v.find(parsePID(value))
		if !ok {
			v.log.warn("ignored MAINPID, which is no process of the service", "value", value)
			return
		}
		if !fromMain && v.phase == running {
			watch.close()
			// Something else in the service may upgrade itself by the same means.
			// But an orphan sees its parent's descriptors closed before this
			// process can see its end.
			v.log.warn("ignored MAINPID while the main process lives", "value", value, "from", m.pid)
			if m.pid == pid && v.upgrading && len(v.claims) < maxClaims {
				v.claims = append(v.claims, message{lines: m.lines, pid: m.pid})
			}
			return
		}
		v.follow(pid, watch)
		fromMain = fromMain || m.pid == pid
	}
	if !fromMain {
		return
	}
	if m.field("READY") == "1" {
		if v.upgrading {
			v.log.warn("still the main process", "pid", v.main, "status", m.field("STATUS"))
		} else {
			v.log.info("ready", "pid", v.main)
		}
		v.upgrading = false
	}
	if m.field("RELOADING") == "1" {
		v.log.info("upgrading", "pid", v.main)
		v.upgrading, v.duringUpgrade, v.claims = true, nil, nil
	}
	if m.field("STOPPING") == "1" {
		v.log.info("stopping", "pid", v.main)
		v.upgrading, v.saidStop = false, true
	}
	v.outer.passOn(m)
}

// fromService reports whether a process of the service has sent the message. The main
// process counts even if its parent has waited for it since.
func (v *supervision) fromService(m message) bool {
	return !tellsSender || m.pid == v.main || v.exists(m.pid)
}

// ignore counts a message that was ignored. Anyone may send many, so not each is logged.
func (v *supervision) ignore(reason string) {
	v.ignored[reason]++
	if time.Since(v.ignoredLogged) > ignoredInterval {
		v.logIgnored()
	}
}

func (v *supervision) logIgnored() {
	for reason, count := range v.ignored {
		v.log.warn("ignored messages", "reason", reason, "count", count)
		v.ignoredLogged = time.Now()
	}
	clear(v.ignored)
}

// parsePID returns the PID that a text says, in the 32 bits that are all that the kernel
// looks at: 4294967295 would be -1, everyone. Of any other text it makes what no process of
// the service has.
func parsePID(text string) int {
	pid, _ := strconv.ParseInt(strings.TrimSpace(text), 10, 32)
	return int(pid)
}

// find reports whether pid is a process of the service. It watches the process first, so
// that the check is about the process that is watched.
func (v *supervision) find(pid int) (found int, w *watch, ok bool) {
	w, _ = watchProcess(pid)
	if !v.exists(pid) {
		w.close()
		return 0, nil, false
	}
	return pid, w, true
}

// follow makes pid the main process, to which the old one has handed over, or which
// takes over from a dead one.
func (v *supervision) follow(pid int, w *watch) {
	if pid == v.main {
		w.close()
		return
	}
	v.log.info("new main process", "pid", pid, "old", v.main)
	maps.DeleteFunc(v.former, func(pid int, _ bool) bool { return !v.exists(pid) })
	if v.phase == running {
		v.former[v.main] = true
		// It has handed over, and obeyed the other signals. These no longer stop the service.
		v.duringUpgrade = slices.DeleteFunc(v.duringUpgrade, func(sig unix.Signal) bool {
			return !slices.Contains(stopping, sig)
		})
	}
	v.watch.close()
	v.main, v.status, v.watch, v.gone = pid, nil, w, w.ended()
	v.phase, v.deadline = running, nil
	v.upgrading, v.saidStop, v.toldStop, v.claims = false, false, false, nil
	if status, ok := v.reaped[pid]; ok {
		v.status = &status
		return
	}
	if w == nil {
		// It is a child of an older generation until the older generation has ended.
		v.poll = time.Tick(time.Second)
	}
	if group, err := unix.Getpgid(pid); err == nil {
		v.group = group
	}
	v.terminal.follow(v.group)

	signals := append(v.duringUpgrade, v.held...)
	v.duringUpgrade, v.held = nil, nil
	for _, sig := range signals {
		v.forward(sig)
	}
}

// mainEnded reports whether the main process has ended. Its parent, an older generation,
// may have waited for it.
func (v *supervision) mainEnded() bool {
	if v.watch != nil && v.gone == nil {
		return true
	}
	return v.status != nil || unix.Kill(v.main, 0) == unix.ESRCH
}

// lost is called when the main process has ended.
func (v *supervision) lost() {
	v.log.info("main process ended", "pid", v.main)
	if pid, w, ok := v.fromPIDFile(); ok {
		v.follow(pid, w)
		return
	}
	if v.upgrading && v.maySucceed() {
		v.phase, v.deadline = abandoned, time.After(v.TakeoverTimeout)
		v.log.info("waiting for a new main process")
		for _, m := range v.claims { // of those that still live, the first takes over
			v.heed(m)
		}
		return
	}
	if pid, w, ok := v.unannounced(); ok {
		v.log.error("following a process that nobody has announced: it must keep NOTIFY_SOCKET and the network namespace", "pid", pid)
		v.follow(pid, w)
		return
	}
	v.end()
}

// fromPIDFile returns the process that the PID file names, if it is another.
func (v *supervision) fromPIDFile() (pid int, w *watch, ok bool) {
	content, _ := os.ReadFile(v.PIDFile) // no PID if it can't be read, or if there is none
	pid, w, ok = v.find(parsePID(string(content)))
	if pid == v.main {
		w.close()
		return 0, nil, false
	}
	return pid, w, ok
}

// unannounced returns the process that serves although the main process has ended unasked,
// with status 0: the main process must have handed over, and could not say so.
func (v *supervision) unannounced() (pid int, w *watch, ok bool) {
	if v.saidStop || v.toldStop || v.status != nil && *v.status != 0 {
		return 0, nil, false
	}
	left, _ := descendants()
	return v.find(findServer(slices.DeleteFunc(left, func(pid int) bool { return v.former[pid] })))
}

// maySucceed reports whether there is a process that may take over.
func (v *supervision) maySucceed() bool {
	if _, known := descendants(); !known {
		return v.anyLeft()
	}
	return v.strayLeft()
}

// anyLeft reports whether any process of the service lives.
func (v *supervision) anyLeft() bool {
	return v.children || v.notReaper && unix.Kill(-v.group, 0) == nil
}

// strayLeft reports whether a process of the service lives that is no older
// generation.
func (v *supervision) strayLeft() bool {
	left, known := descendants()
	return !known || slices.ContainsFunc(left, func(pid int) bool { return pid != v.main && !v.former[pid] })
}

// spared returns the processes that this one does not end.
func (v *supervision) spared() map[int]bool {
	if v.unasked {
		return v.former
	}
	return nil
}

// end sends SIGTERM to the processes that the service leaves behind, except older
// generations, which drain and end by themselves.
func (v *supervision) end() {
	v.phase, v.deadline = ending, time.After(v.StopTimeout)
	if v.unasked = !v.saidStop && !v.toldStop; v.unasked {
		v.hurry = time.After(hurryTimeout)
	}
	v.terminal.leave() // Ctrl-C is for this process, too, from now on
	if !v.anyLeft() {
		v.phase = ended
		return
	}
	v.log.info("waiting for what is left")
	v.signalLeft(unix.SIGTERM, v.former)
	for _, sig := range v.held {
		v.forward(sig)
	}
}

// expire is called when a phase has taken too long.
func (v *supervision) expire() {
	switch v.phase {
	case abandoned:
		v.log.warn("nobody took over in time")
		v.end()
	case ending:
		v.log.warn("killing what is left")
		v.phase, v.deadline = killing, time.After(killTimeout)
	case killing:
		v.log.error("can't kill what is left")
		v.phase = ended
	}
}

// forward passes a signal on to the main process of the moment.
func (v *supervision) forward(sig unix.Signal) {
	if sig == unix.SIGCONT && v.terminal.resumed() {
		return
	}
	switch {
	case v.phase == running:
		if slices.Contains(lasting, sig) && (v.upgrading || v.PIDFile != "") {
			v.duringUpgrade = remember(v.duringUpgrade, sig)
		}
		v.toldStop = v.toldStop || slices.Contains(stopping, sig)
		if err := v.signalMain(sig); err != nil {
			v.log.error("can't forward", "signal", unix.SignalName(sig), "pid", v.main, "error", err)
		} else if sig != unix.SIGWINCH && sig != unix.SIGCONT {
			v.log.info("forwarded", "signal", unix.SignalName(sig), "pid", v.main)
		}
	case v.phase == abandoned:
		v.held = remember(v.held, sig)
		v.log.info("holding", "signal", unix.SignalName(sig))
	case slices.Contains(stopping, sig):
		v.signalLeft(sig, nil)
	}
}

// remember adds a signal once, as the kernel does to those that are pending.
func remember(signals []unix.Signal, sig unix.Signal) []unix.Signal {
	if slices.Contains(signals, sig) {
		return signals
	}
	return append(signals, sig)
}

func (v *supervision) signalMain(sig unix.Signal) error {
	if v.watch != nil {
		return v.watch.signal(sig)
	}
	return unix.Kill(v.main, sig) // a child, which only this process waits for, unless there are no pidfds
}

// signalLeft signals all processes of the service but these.
func (v *supervision) signalLeft(sig unix.Signal, except map[int]bool) {
	left, known := descendants()
	if !known {
		_ = unix.Kill(-v.group, sig)
	}
	for _, pid := range left {
		if !except[pid] {
			_ = signalDescendant(pid, sig)
		}
	}
}

// exitStatus is the main process's, as shells have it.
func (v *supervision) exitStatus() int {
	status := v.status
	if status == nil {
		status = v.watch.status()
	}
	switch {
	case status == nil && v.saidStop:
		return 0
	case status == nil:
		return 1
	case *status == 0 && v.upgrading && !v.toldStop: // to nobody
		return 1
	case status.Signaled():
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// isSupervised reports whether the process descends from a supervisor.
func isSupervised() bool {
	supervisor := parsePID(os.Getenv(supervisorVariable))
	return supervisor > 0 && isAncestor(supervisor)
}

// adopt prepares a process of the service that calls Self: it does what its supervisor
// cannot do for it.
func adopt() error {
	if os.Getenv("LISTEN_PID") == os.Getenv(supervisorVariable) {
		if err := os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid())); err != nil {
			return err
		}
	}
	// A group of its own, so that the terminal's Ctrl-C does not also reach the
	// generation that it replaces. Only a process itself can do that after execve.
	if openTerminal() != nil && unix.Getpgrp() != os.Getpid() {
		return os.NewSyscallError("setpgid", unix.Setpgid(0, 0))
	}
	return nil
}
