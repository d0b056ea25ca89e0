package tableflip

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/systemd"
	"example.com/tableflip/internal/upstream"
)

// This file is the parent's side of the conversation with its child: it owns
// the read end of the ready pipe and the write end of the verdict pipe. The words are
// in parent.go.

const (
	// pipeGrace is how long a child that has exited gets to be noticed by its pipe.
	pipeGrace = time.Second

	// maxLine bounds what is read of a child that says no end of anything.
	maxLine = 4096
)

// committed keeps what tells a child of the end of this process open until the kernel
// closes it.
var committed []*child

// A child is a new process that has not been put in charge yet.
type child struct {
	process *process.Process
	ready   *os.File
	lines   *bufio.Reader // of ready
	verdict *os.File
	names   *os.File // nil without Options.Compat, which Close permits: the write end of what a child with the other library has as descriptor 4

	isUpstream bool // the child uses the other library
	here       bool
	isHere     atomic.Bool     // the process that was started said so itself
	pid        int             // of the process that was started, or of the one that said it is here, which a wrapper has started
	accepts    []string        // the words, of those offered, that the child understands
	onTrial    bool            // it serves beside this process
	leaves     bool            // it has said that it drains, on trial
	isUndone   bool            // it was told to drain, on trial
	committed  bool            // it may take charge
	ended      chan struct{}   // closed when a child whose trial was undone has ended
	sayHurry   sync.Once       // because it may be suspended, and the pipe has no room for ever
	announced  *process.Handle // of pid, if it is another process than the one that was started
	hereHeard  func()          // called when the child says that it is here
	cause      string          // what it did wrong, if it said so
}

// startChild starts cmd, as a child of this process or of systemd, with fds as its
// descriptors from 5 on. It completes the table, whose entries are fds. The caller keeps
// fds. With compat, the child may use the other library.
func startChild(ctx context.Context, cmd *exec.Cmd, env systemd.Env, table nametable.Table, fds []uintptr, compat bool) (*child, error) {
	r, readyWrite, err := openPipe()
	if err != nil {
		return nil, err
	}
	defer descriptor.Close(readyWrite)
	readyRead, err := descriptor.PolledFile(r, "ready")
	if err != nil {
		return nil, err
	}
	verdictRead, w, err := openPipe()
	if err != nil {
		readyRead.Close()
		return nil, err
	}
	defer descriptor.Close(verdictRead)
	// In blocking mode, because the pipe has room for all words.
	verdictWrite := os.NewFile(w, "verdict")

	c := &child{
		ready:   readyRead,
		lines:   bufio.NewReaderSize(readyRead, maxLine),
		verdict: verdictWrite,
		ended:   make(chan struct{}),
	}
	table.PID = os.Getpid()
	table.PIDNamespace = process.PIDNamespace()
	table.Offers = offers
	// Options.Command may have brought back what the package has removed.
	cmd.Env = slices.DeleteFunc(cmd.Environ(), func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		return inherit.IsVariable(name) || name == inherit.Upstream
	})
	fourth := verdictRead
	var names []byte
	if compat {
		names = upstream.Encode(namesOf(table.Entries))
		if fourth, w, err = openPipe(); err == nil {
			defer descriptor.Close(fourth)
			c.names, err = descriptor.PolledFile(w, "names")
		}
		if err != nil {
			c.close()
			return nil, err
		}
		cmd.Env = append(cmd.Env, inherit.Upstream+"=yes")
		table.Entries = append(table.Entries, &nametable.Entry{Name: verdictPipe})
		fds = append(fds, verdictRead)
	}
	err = identifyPipes(&table, readyWrite, fourth, verdictWrite)
	if err == nil {
		cmd.Env = append(env.ForChild(cmd.Env), table.Encode()...)
		fds = append([]uintptr{readyWrite, fourth}, fds...)
		c.process, err = process.Start(ctx, cmd, fds, env.IsParent())
	}
	if err != nil {
		c.close()
		return nil, err
	}
	if c.names != nil {
		// They may not fit into the pipe before the child reads, which it may never do.
		go c.names.Write(names)
	}
	c.pid = c.process.PID()
	step.Reached(step.ChildStarted)
	return c, nil
}

func openPipe() (r, w uintptr, err error) {
	if r, w, err = descriptor.Pipe(); err != nil {
		err = fmt.Errorf("tableflip: can't start a new process: %w%s", err, process.LimitHint(err))
	}
	return r, w, err
}

// namesOf returns the names of the entries that belong to the registry.
func namesOf(entries []*nametable.Entry) []nametable.Name {
	var names []nametable.Name
	for _, e := range ownEntries(entries) {
		names = append(names, e.Name)
	}
	return names
}

// identifyPipes enters into the table what tells the child's ends of the pipes from
// others.
func identifyPipes(t *nametable.Table, ready, verdict uintptr, verdictWrite *os.File) error {
	var readyErr, verdictErr error
	t.Ready, readyErr = identifyPipe(ready)
	t.Verdict, verdictErr = identifyPipe(verdict)
	if err := errors.Join(readyErr, verdictErr); err != nil {
		return err
	}
	if descriptor.UniquePipes && t.Ready != t.Verdict { // which are not the zeros of all pipes
		return nil
	}
	if slices.ContainsFunc(t.Entries, isVerdictPipe) {
		return nil // the child's parent tells: see hasPipes
	}
	t.Token = strconv.FormatUint(rand.Uint64(), 36) // to tell pipes apart, not to keep a secret
	_, err := io.WriteString(verdictWrite, t.Token)
	return err
}

func (c *child) close() {
	c.ready.Close()
	c.verdict.Close()
	c.names.Close()
	if c.announced != nil {
		c.announced.Close()
	}
}

// say tells the child a word. It does not block: the pipe has room for all words.
func (c *child) say(word string) error {
	_, err := io.WriteString(c.verdict, word+"\n")
	return err
}

// next returns the words of the child's next line. Its error is the cause of ctx's
// end, or wraps what the read has returned.
func (c *child) next(ctx context.Context) ([]string, error) {
	if ctx.Err() != nil {
		return nil, c.why(ctx)
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.ready.SetReadDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	defer func() {
		if !stop() {
			<-interrupted
			c.ready.SetReadDeadline(time.Time{})
		}
	}()
	if c.names != nil && !c.here {
		if first, _ := c.lines.Peek(1); len(first) > 0 && first[0] == upstream.ReadyByte {
			c.lines.Discard(1)
			return []string{wordUpstream}, nil
		}
	}
	line, err := c.lines.ReadSlice('\n')
	switch {
	case err == nil:
		return strings.Fields(string(line)), nil
	case ctx.Err() != nil:
		return nil, c.why(ctx)
	case errors.Is(err, bufio.ErrBufferFull):
		return nil, fmt.Errorf("tableflip: the new process, %d, said %.40q and no end of more", c.process.PID(), line)
	default:
		return nil, fmt.Errorf("tableflip: can't read what the new process, %d, says: %w", c.process.PID(), err)
	}
}

// awaitReady returns once the child serves. An error is final: the child has
// died, given up, or is late.
func (c *child) awaitReady(ctx context.Context) error {
	watched, stop := c.watch(ctx)
	defer func() { stop() }()
	for {
		words, err := c.next(watched)
		if errors.Is(err, io.EOF) {
			err = c.waitExit(watched)
		}
		// Whoever has called the upgrade off needs no explanation.
		calledOff := ctx.Err() != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded)
		if err != nil && !c.here && !calledOff && c.names == nil {
			err = fmt.Errorf("%w%s", err, cmp.Or(c.process.Hint(),
				"; it did not call New, or not with what this process passed on, which wrappers such as sudo or env -i do not keep"))
		}
		if err != nil {
			return err
		}
		if len(words) == 0 {
			continue
		}

		switch words[0] {
		case wordHere:
			if c.here {
				return fmt.Errorf("tableflip: the new process, %d, said twice that it is here", c.pid)
			}
			if err := c.hearHere(words[1:]); err != nil {
				return err
			}
			c.hereHeard()
			stop()
			watched, stop = c.watch(ctx) // the process that has announced itself, too
		case wordUpstream:
			// From now on it serves, and takes itself to be in charge.
			c.here, c.isUpstream = true, true
			c.hereHeard()
			step.Reached(step.ReadyReceived)
			return nil
		case wordReady:
			if !c.here {
				return fmt.Errorf("tableflip: the new process, %d, said that it is ready and not that it is here", c.process.PID())
			}
			step.Reached(step.ReadyReceived)
			return nil
		case wordFailed:
			return c.left(ctx, words)
		}
	}
}

// hearHere notes who has called New.
func (c *child) hearHere(words []string) error {
	if len(words) == 0 {
		words = []string{""}
	}
	c.here = true
	c.accepts = words[1:]
	if words[0] == "-" {
		return nil // in a PID namespace of its own, it does not know
	}

	pid, err := strconv.Atoi(words[0])
	// This process has the pipe open, too.
	if err != nil || pid <= 0 || pid == os.Getpid() {
		return fmt.Errorf("tableflip: the new process, %d, said %q instead of its process ID", c.process.PID(), words[0])
	}
	if pid == c.pid {
		c.isHere.Store(true)
		return nil
	}
	// A wrapper has started it. It is killed with the wrapper if it proves to be
	// what it says it is.
	c.pid = pid
	handle, err := process.Open(pid)
	if errors.Is(err, os.ErrProcessDone) {
		return c.announcedExited()
	}
	if err != nil {
		return nil // only the pipe tells when it ends
	}
	held, err := c.isHeldBy(pid)
	if errors.Is(err, os.ErrProcessDone) {
		_ = handle.WaitFor(step.ExitGrace)
	}
	switch {
	case handle.Ended(): // one that has ended holds nothing
		handle.Close()
		return c.announcedExited()
	case held:
		c.announced = handle
	default:
		handle.Close()
	}
	return nil
}

// announcedExited is the error of a child that a wrapper has started.
func (c *child) announcedExited() error {
	return fmt.Errorf("tableflip: the new process, %d, exited before it was in charge", c.pid)
}

// isHeldBy reports whether a process has the ready pipe open, as process.HoldsPipe does.
func (c *child) isHeldBy(pid int) (held bool, err error) {
	err = descriptor.Control(c.ready, func(fd uintptr) error {
		_, inode, err := descriptor.IdentifyPipe(fd)
		if err == nil {
			held, err = process.HoldsPipe(pid, inode, process.WriteEnd)
		}
		return err
	})
	return held, err
}

// named adds to the reason why an upgrade had to end which process was starting. The
// text of ErrStopped is left alone, because callers compare it.
func (c *child) named(err error) error {
	if err == ErrStopped {
		return err
	}
	return fmt.Errorf("%w; the new process was %d", err, c.pid)
}

// left returns why a child leaves, or nil if these words do not say that it does.
func (c *child) left(ctx context.Context, words []string) error {
	switch {
	case len(words) == 0:
	case words[0] == wordFailed:
		c.leaves = c.onTrial
		return c.failed(ctx, words[1:])
	case words[0] == wordStopping && c.onTrial:
		c.leaves = true
		return fmt.Errorf("tableflip: the new process, %d, was stopped during its trial", c.pid)
	}
	return nil
}

// failed is the error of a child that has said why it leaves. It gets the time for that.
func (c *child) failed(ctx context.Context, reason []string) error {
	c.cause = causeReason
	err := fmt.Errorf("tableflip: the new process, %d, failed: %s", c.pid, strings.Join(reason, " "))
	if !c.leave(ctx) || c.process.Err() == nil || c.process.Err() == process.ErrStatusUnknown {
		return err
	}
	return fmt.Errorf("%w (%w)", err, c.process.Err())
}

// checkAlive returns an error if a child that was ready has gone.
func (c *child) checkAlive(ctx context.Context) error {
	isGone := c.hasHungUp
	if c.isUpstream { // it has closed its pipe
		isGone = c.hasEnded
	}
	if !isGone() {
		return nil
	}
	return c.orReason(ctx, fmt.Errorf("tableflip: the new process, %d, was ready, and has died or was stopped", c.pid))
}

// hasEnded reports whether the process is known to have ended, without waiting for it.
func (c *child) hasEnded() bool {
	handle, err := process.Open(c.pid)
	if err != nil {
		return errors.Is(err, os.ErrProcessDone)
	}
	defer handle.Close()
	return handle.Ended()
}

// orReason returns what the child has said when it left, or err.
func (c *child) orReason(ctx context.Context, err error) error {
	for words := range c.unheard {
		if reason := c.left(ctx, words); reason != nil {
			return reason
		}
	}
	return err
}

// leave gives a child that is to exit by itself the time to do so. It reports whether
// the process that was started has.
func (c *child) leave(ctx context.Context) (exited bool) {
	ctx, cancel := context.WithTimeout(ctx, step.ExitGrace)
	defer cancel()
	select {
	case <-c.process.Exited():
	case <-ctx.Done():
		return false
	}
	if handle := c.announced; handle != nil {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = handle.Wait()
		}()
		select {
		case <-ended:
		case <-ctx.Done():
		}
	}
	return true
}

// watch returns a context that also ends when the child has died, which the pipe does
// not tell if a descendant of the child has it open. It waits for the process only after
// pipeGrace, because most children are ready by then, and because that takes a thread on
// systems without pidfds.
func (c *child) watch(ctx context.Context) (context.Context, func()) {
	ctx, fail := context.WithCancelCause(ctx)
	isUndone := c.isUndone
	timer := time.AfterFunc(pipeGrace, func() {
		select {
		case <-c.process.Exited():
			// One that succeeds may be a wrapper that has started the
			// service in the background. The end of a wrapper is nothing to a
			// service that was told to drain.
			err := c.process.Err()
			if c.isHere.Load() || !isUndone && err != nil && err != process.ErrStatusUnknown {
				fail(errExited)
			}
		case <-ctx.Done():
		}
	})
	if handle := c.announced; handle != nil {
		go func() {
			if handle.Wait() == nil {
				time.AfterFunc(pipeGrace, func() {
					fail(c.announcedExited())
				})
			}
		}()
	}
	return ctx, func() {
		timer.Stop()
		fail(nil)
	}
}

// errExited ends the context of watch, from a goroutine that knows nothing else of c.
var errExited = errors.New("exited")

// why returns the cause of the end of a context that watch may have returned.
func (c *child) why(ctx context.Context) error {
	if err := context.Cause(ctx); err != errExited {
		return err
	}
	return c.exitError()
}

// waitExit waits for a child that has closed its ready pipe to exit.
func (c *child) waitExit(ctx context.Context) error {
	grace := time.NewTimer(step.ExitGrace)
	defer grace.Stop()
	select {
	case <-c.process.Exited():
		return c.exitError()
	case <-grace.C:
		return fmt.Errorf("tableflip: the new process, %d, gave up, and was killed because it did not exit", c.process.PID())
	case <-ctx.Done():
		return c.why(ctx)
	}
}

func (c *child) exitError() error {
	err := cmp.Or(c.process.Err(), errors.New("exit status 0"))
	hint := "" // awaitReady adds it for a child that said nothing
	if c.here {
		hint = c.process.Hint()
	}
	when := "before it was ready"
	if c.onTrial {
		when = "during its trial"
	}
	return fmt.Errorf("tableflip: the new process, %d, exited %s: %w%s", c.process.PID(), when, err, hint)
}

// knowsTrials reports whether the child can serve beside this process.
func (c *child) knowsTrials() bool { return slices.Contains(c.accepts, wordTrial) }

var errTrialOver = errors.New("the trial is over")

// tryOut has the child serve beside this process, and returns nil when it has done so for
// long enough. After an error, undo tells what becomes of it.
func (c *child) tryOut(ctx context.Context, trial time.Duration) error {
	if err := c.say(wordTrial); err != nil {
		return c.orReason(ctx, fmt.Errorf("tableflip: the new process, %d, was ready, and died or was stopped: %w", c.pid, err))
	}
	c.onTrial = true
	step.Reached(step.TrialBegun)
	limited, cancel := context.WithTimeoutCause(ctx, trial, errTrialOver)
	defer cancel()
	limited, stop := c.watch(limited)
	defer stop()
	for {
		words, err := c.next(limited)
		switch {
		case err == errTrialOver:
			step.Reached(step.TrialOver)
			return nil
		case errors.Is(err, io.EOF):
			return c.waitExit(ctx)
		case err != nil:
			return err
		}
		if err := c.left(ctx, words); err != nil {
			return err
		}
	}
}

// undo tells a child on trial that it will not be put in charge, and reports whether it has
// heard that or left by itself, and drains or has ended. Otherwise it is to be aborted.
func (c *child) undo() (leaves bool) {
	if !c.onTrial || c.committed && !c.leaves {
		return false // it does not serve, or does not react
	}
	c.isUndone = true
	_ = c.say(wordAbort)
	ctx, cancel := context.WithTimeout(context.Background(), step.AcknowledgeTimeout)
	defer cancel()
	ctx, stop := c.watch(ctx)
	defer stop()
	for !c.leaves {
		words, err := c.next(ctx)
		if err != nil {
			break
		}
		_ = c.left(ctx, words)
	}
	if !c.leaves { // it may have said so while this process was suspended
		_ = c.orReason(ctx, nil)
	}
	return c.leaves
}

// hurry tells a child that drains, because its trial was undone, that its place is needed.
func (c *child) hurry() {
	c.sayHurry.Do(func() { _ = c.say(wordHurry) })
}

// awaitEnd returns when a child that drains, because its trial was undone, has ended.
func (c *child) awaitEnd() {
	ctx, stop := c.watch(context.Background())
	defer stop()
	for {
		if _, err := c.next(ctx); err != nil {
			break
		}
	}
	c.leave(context.Background())
	_ = c.abort()
	c.close() // abort has not if the process can't be killed
}

// commit puts the child in charge. After an error it may be all the same, until abort
// has returned nil.
func (c *child) commit(ctx context.Context) error {
	step.Reached(step.BeforeCommit)
	if err := c.checkAlive(ctx); err != nil {
		return err
	}
	if c.isUpstream { // it takes itself to be in charge
		return nil
	}
	if err := c.say(wordCommit); err != nil {
		return c.orReason(ctx, fmt.Errorf("tableflip: the new process, %d, was ready, and died or was stopped: %w", c.pid, err))
	}
	c.committed = true
	step.Reached(step.AfterCommit)
	if c.onTrial { // it has accepted, and must not be killed because of a Stop in this moment
		ctx = context.WithoutCancel(ctx)
	}

	ctx, cancel := context.WithTimeoutCause(ctx, step.AcknowledgeTimeout,
		fmt.Errorf("tableflip: the new process, %d, did not take charge in %v: %w", c.pid, step.AcknowledgeTimeout, os.ErrDeadlineExceeded))
	defer cancel()
	ctx, stop := c.watch(ctx)
	defer stop()
	err := c.awaitAcknowledged(ctx)
	if err != nil && ctx.Err() != nil {
		// The acknowledgement may have come at the last moment.
		err = c.lastWord(err)
	}
	if err == nil {
		step.Reached(step.AcknowledgementReceived)
	}
	return err
}

func (c *child) awaitAcknowledged(ctx context.Context) error {
	for {
		words, err := c.next(ctx)
		switch {
		case errors.Is(err, io.EOF):
			return fmt.Errorf("tableflip: the new process, %d, was ready, and died or was stopped before it took charge", c.pid)
		case err != nil:
			return err
		case len(words) > 0 && words[0] == wordAcknowledged:
			return nil
		}
		if err := c.left(ctx, words); err != nil {
			return err
		}
	}
}

// lastWord reads what the child has said, and returns err unless that is its
// acknowledgement.
func (c *child) lastWord(err error) error {
	for words := range c.unheard {
		if len(words) > 0 && words[0] == wordAcknowledged {
			return nil
		}
	}
	return err
}

// hearLateHere reads a here that has not been read yet, so that abort also kills the
// process that sent it.
func (c *child) hearLateHere() {
	if c.here {
		return
	}
	for words := range c.unheard {
		if len(words) > 0 && words[0] == wordHere {
			_ = c.hearHere(words[1:])
			return
		}
	}
}

// unheard iterates over the lines that the child has said, however long this process was
// suspended. It waits only for the end of a line that has begun, and not for long.
func (c *child) unheard(yield func(words []string) bool) {
	limited, cancel := context.WithTimeout(context.Background(), step.LineGrace)
	defer cancel()
	for range maxLine { // a child may say no end of lines, too
		ctx := limited
		switch anything, whole := c.said(); {
		case !anything:
			return
		case whole:
			ctx = context.Background() // there is nothing to wait for
		}
		if words, err := c.next(ctx); err != nil || !yield(words) {
			return
		}
	}
}

// said reads what the child has said into the buffer, as far as it needs to, without
// waiting. It reports whether there is anything, and whether that holds a whole line.
func (c *child) said() (anything, whole bool) {
	for {
		said, _ := c.lines.Peek(c.lines.Buffered())
		if bytes.IndexByte(said, '\n') >= 0 {
			return true, true
		}
		readable, _, _ := descriptor.PollOf(c.ready)
		if !readable {
			return len(said) > 0, false
		}
		if _, err := c.lines.Peek(len(said) + 1); err != nil {
			return len(said) > 0, false
		}
	}
}

// keep holds the pipes of a child that is in charge open until the kernel closes
// them, which is how the child learns that this process has ended.
func (c *child) keep(logger *slog.Logger) {
	committed = append(committed, c)
	exited := c.process.Exited() // so that it is no zombie until this process ends
	if logger == nil {
		return
	}
	go func() {
		<-exited
		if c.process.Err() == nil {
			return // it was stopped, or replaced, or has started the service in the background
		}
		logger.Warn("tableflip: the process that was started by the upgrade ended before the old one did",
			"started", c.process.PID(), "ready", c.pid, "error", c.process.Err())
	}()
}

// hearSuccessors waits until a child that is in charge has ended, and all that came after
// it. It reports whether the last one was told to stop. Hear is called for their words.
func (c *child) hearSuccessors(hear func(words []string)) (wasStopped bool) {
	if c.isUpstream { // it has closed its pipe, and says nothing
		<-c.process.Exited()
		return c.process.Err() == nil
	}
	for {
		words, err := c.next(context.Background())
		if err != nil {
			return wasStopped
		}
		if len(words) > 0 {
			wasStopped = wasStopped || words[0] == wordStopping
			hear(words)
		}
	}
}

// speaksToEarlier reports whether the child speaks to all earlier generations.
func (c *child) speaksToEarlier() bool { return slices.Contains(c.accepts, wordEarlier) }

// forwardReload tells a child that is in charge that the service manager waits for
// the answer to a reload.
func (c *child) forwardReload() {
	if slices.Contains(c.accepts, wordReload) {
		_ = c.say(wordReload)
	}
}

// forwardUpgrade has a child that is in charge make an upgrade.
func (c *child) forwardUpgrade() {
	if slices.Contains(c.accepts, wordUpgrade) {
		_ = c.say(wordUpgrade)
		return
	}
	c.forwardReload()
}

// hasHungUp reports whether the child has closed its end of the ready pipe, as its
// death does.
func (c *child) hasHungUp() bool {
	_, hungUp, err := descriptor.PollOf(c.ready)
	return hungUp || err != nil
}

// dismiss has a child leave that was started for a rehearsal, in its own time as far as
// that is short. It is to be aborted then.
func (c *child) dismiss() {
	if c.here && !c.isUpstream {
		_ = c.say(wordAbort + " " + wordRehearsal)
		c.leave(context.Background())
	}
}

// abort tells the child, should it still listen, to touch nothing that is shared, and
// kills it. It returns nil once the child cannot take charge any more, and an error if
// that cannot be confirmed.
func (c *child) abort() error {
	_ = c.say(wordAbort)
	c.hearLateHere()
	var processErr, announcedErr error
	var killing sync.WaitGroup
	killing.Go(func() { processErr = c.process.Kill(step.KillTimeout) })
	if c.announced != nil {
		killing.Go(func() { announcedErr = c.announced.Kill(step.KillTimeout) })
	}
	killing.Wait()
	err := errors.Join(processErr, announcedErr)
	if err == nil && c.committed && !c.isKnown() && !c.hasHungUp() {
		err = fmt.Errorf("tableflip: the new process, which a wrapper, %d, has started, was told to leave, and is still there", c.process.PID())
	}
	if err == nil {
		c.close()
	}
	return err
}

// isKnown reports whether it is the child itself whose death this process can see.
func (c *child) isKnown() bool { return c.isHere.Load() || c.announced != nil }

// settle waits, until ctx ends, for a child of which abort could confirm nothing. It
// reports whether the child is in charge, because it acknowledged the commit; if not, it
// cannot take charge any more: it cannot acknowledge, and will read that it was aborted.
func (c *child) settle(ctx context.Context) (inCharge bool) {
	if c.isKnown() {
		watched, stop := c.watch(ctx)
		defer stop()
		ctx = watched
	}
	if c.isUpstream { // it will say no more
		select {
		case <-c.process.Exited():
		case <-ctx.Done():
		}
	} else {
		err := c.awaitAcknowledged(ctx)
		if err != nil && ctx.Err() != nil {
			err = c.lastWord(err)
		}
		if err == nil && c.committed {
			return true
		}
	}
	// What is said between the last look and this is lost. A child can say it only if it
	// was suspended between its own last look for an abort and its acknowledgement, and
	// goes on in this very moment.
	c.close()
	return false
}
