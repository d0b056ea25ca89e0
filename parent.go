package tableflip

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/upstream"
)

// This file is the child's side of the conversation with its parent: it owns
// the write end of the ready pipe and the read end of the verdict pipe. Both sides
// speak in lines of words, and ignore words that they do not know.

// The child's words, on the ready pipe.
const (
	wordHere         = "here"         // PID WORD…: New was called, and accepts WORDs
	wordReady        = "ready"        // Ready was called
	wordAcknowledged = "acknowledged" // the child is in charge
	wordFailed       = "failed"       // REASON: it leaves
	wordStopping     = "stopping"     // in charge, it was told to stop: its end is no crash; on trial, it drains
)

// wordUpstream stands for what a child with the other library says when it is ready.
const wordUpstream = "*"

// The words of the process in charge to all earlier generations, on their ready pipes,
// beside wordStopping.
const (
	wordSucceeded = "succeeded" // PID NUMBER: a generation after the child is in charge
	wordHurry     = "hurry"     // the place of the process is needed
)

// The parent's words, on the verdict pipe.
const (
	wordCommit   = "commit"   // the child is to take charge
	wordTrial    = "trial"    // the child is to serve beside the parent, which stays in charge
	wordAbort    = "abort"    // WORD…: it is not, and must leave
	wordNotified = "notified" // the service manager knows the child
	wordReload   = "reload"   // the manager asked the parent for a reload after the commit
	wordUpgrade  = "upgrade"  // so did somebody for an upgrade, which the child is to make
)

// To a child whose trial it has undone, and that drains, the parent also says wordHurry and
// wordStopping.

// offers are the words beyond the handover itself that this version knows. A parent
// offers them in the table, and a child accepts what it knows of them when it says that
// it is here. Neither says a word that was not accepted.
var offers = []string{wordReload, wordUpgrade, wordEarlier, wordTrial}

// wordEarlier is accepted by a child that watches the earlier generations that its parent
// passes on, and speaks to them once it is in charge.
const wordEarlier = "earlier"

// accepted returns those of the words that a parent has offered which this version knows.
func accepted(offered []string) []string {
	return slices.DeleteFunc(slices.Clone(offered), func(word string) bool {
		return !slices.Contains(offers, word)
	})
}

// parentHandle is the kind and the name under which a parent passes a handle of its
// own process.
var parentHandle = nametable.Name{Kind: "process", Network: "parent"}

// verdictPipe is the kind and the name of the verdict pipe if it is not descriptor 4. With
// Options.Compat that is where a child with the other library looks for the names.
var verdictPipe = nametable.Name{Kind: "pipe", Network: "verdict"}

func isVerdictPipe(e *nametable.Entry) bool { return e.Name == verdictPipe }

// A parent is the process that started this one to be replaced by it.
type parent struct {
	elder
	older []*elder // those before the parent that lived when this process was started, oldest first

	listenOnce sync.Once
	asked      func(word string) // called for wordReload and wordUpgrade

	decided chan struct{} // closed once one of these is true:
	commit  bool          // the parent has put this process in charge, if it acknowledges that
	refusal error         // the parent stays in charge
	orphan  bool          // the parent died before it decided

	trial   chan struct{} // closed once the parent has said wordTrial
	onTrial atomic.Bool   // Ready has returned because of that
	hurried chan struct{} // closed if the trial was undone, and the parent needs the place of this process
	stopped bool          // the parent has undone the trial and was stopped; valid once exited is closed

	isReady   chan struct{} // nil unless the parent uses the other library: closed by sayReady
	readyOnce sync.Once     // for isReady

	aborted  chan struct{} // closed if the parent takes the commit back
	notified chan struct{} // closed once the parent has told the service manager that this is the main process
	changed  chan struct{} // receives when notified was closed, or an earlier generation has ended

	mu        sync.Mutex
	inCharge  bool          // this process has acknowledged the commit, or is an orphan
	abandoned error         // why it never will be
	leaves    chan struct{} // closed when it has abandoned
}

// newParent adopts the ends of the pipes, and says that New was called.
func newParent(t *nametable.Table, verdict uintptr) (*parent, error) {
	// This end of the pipe is shared with no one. Non-blocking, waiting for the
	// parent to exit takes no thread.
	if err := descriptor.SetNonblock(verdict, true); err != nil {
		return nil, fmt.Errorf("tableflip: inherit the pipes of the handover: %w", err)
	}
	p := adoptPipes(os.NewFile(verdict, "verdict"))
	p.generation = Generation{Number: max(t.Generation, 1), Since: t.Since, State: stateInCharge}

	// In a PID namespace of its own this process does not know the number by which
	// the parent knows it. There, its own parent is 0 or another process, and no table
	// comes from a process 1. If the two are one, /proc, which is slow in a process that
	// has just started, need not be asked.
	pid := "-"
	if os.Getppid() == t.PID || t.PIDNamespace == process.PIDNamespace() {
		pid = ownPID()
		p.generation.PID = t.PID
	}
	// Whether the parent has heard shows in its verdict.
	_ = p.say(append([]string{wordHere, pid}, accepted(t.Offers)...)...)
	step.Reached(step.HereSaid)
	return p, nil
}

// adoptPipes returns a parent that has not been heard of yet.
func adoptPipes(verdict *os.File) *parent {
	return &parent{
		elder: elder{
			ready:   os.NewFile(inherit.ReadyFD, "ready"),
			verdict: verdict,

			processEnded: make(chan struct{}),
			exited:       make(chan struct{}),
		},
		decided:  make(chan struct{}),
		trial:    make(chan struct{}),
		hurried:  make(chan struct{}),
		leaves:   make(chan struct{}),
		aborted:  make(chan struct{}),
		notified: make(chan struct{}),
		changed:  make(chan struct{}, 1),
	}
}

// newUpstreamParent adopts what a parent with the other library has passed on. That
// parent has no words: it listens for one byte, and takes charge from itself when it
// comes. So this process decides when it is ready, and the byte is its acknowledgement.
func newUpstreamParent(theirs *upstream.Parent) *parent {
	p := adoptPipes(theirs.Pipe)
	p.isReady = make(chan struct{})
	p.generation = Generation{PID: theirs.PID, Number: 1, State: stateInCharge}
	if handle, err := process.Open(theirs.PID); err == nil {
		p.handle = handle
		if os.Getppid() != theirs.PID { // it has ended, and the ID may be another's
			p.handle.Close()
			p.handle = nil
		}
	}
	return p
}

// isUpstream reports whether the parent uses the other library.
func (p *parent) isUpstream() bool { return p.isReady != nil }

// listen begins to listen to the parent, and to wait for the ends of the elders before it,
// once.
func (p *parent) listen(asked func(word string), ended func(e *elder)) {
	p.listenOnce.Do(func() {
		p.asked = asked
		if p.isUpstream() {
			go p.watchUpstream()
		} else {
			go p.watch()
		}
		if p.handle != nil {
			go p.watchProcess()
		}
		for _, e := range p.older {
			go func() {
				e.watch()
				p.change()
				ended(e)
			}()
		}
	})
}

// say tells the parent words, or what they are to one with the other library.
func (p *parent) say(words ...string) error {
	if !p.isUpstream() {
		return p.elder.say(words...)
	}
	if words[0] != wordAcknowledged {
		return nil
	}
	_, err := p.ready.Write([]byte{upstream.ReadyByte})
	return err
}

// change wakes the upgrade that waits, if one does.
func (p *parent) change() {
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// watch waits for the verdict, and then for the parent to exit.
func (p *parent) watch() {
	for lines := bufio.NewReader(p.verdict); ; {
		// An abort right behind the commit takes it back: this process may have been
		// suspended meanwhile.
		if p.commit && lines.Buffered() == 0 && !isClosed(p.decided) {
			close(p.decided)
		}
		line, err := lines.ReadString('\n')
		if errors.Is(err, os.ErrDeadlineExceeded) && p.unread() {
			continue
		}
		if err != nil {
			p.hearEnd(err)
			return
		}
		p.hear(strings.Fields(line))
	}
}

// watchUpstream does what watch does, for a parent with the other library.
func (p *parent) watchUpstream() {
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, p.verdict)
		ended <- cmp.Or(err, io.EOF)
	}()
	var err error
	select {
	case <-p.isReady:
		p.commit = true
		close(p.decided)
		err = <-ended
	case err = <-ended:
	}
	p.hearEnd(err)
}

// hear obeys a line of the parent.
func (p *parent) hear(words []string) {
	if len(words) == 0 {
		return
	}
	decided := isClosed(p.decided)
	switch word := words[0]; {
	case word == wordCommit && !decided:
		p.commit = true // watch closes decided
	case word == wordTrial && !decided && !isClosed(p.trial):
		close(p.trial)
	case word == wordAbort && !decided:
		switch {
		case slices.Contains(words, wordRehearsal):
			p.refuse(errRehearsal)
		case p.onTrial.Load():
			p.refuse(errUndone)
		default:
			p.refuse(errAborted)
		}
	case word == wordAbort && p.commit && !isClosed(p.aborted):
		close(p.aborted)
	case word == wordNotified:
		if !isClosed(p.notified) {
			close(p.notified)
			p.change()
		}
	case word == wordHurry && !isClosed(p.hurried):
		close(p.hurried)
	case word == wordStopping:
		p.stopped = true
	case word == wordReload || word == wordUpgrade:
		p.asked(word)
	}
}

// wordRehearsal follows wordAbort after a rehearsal. A child that does not know it is
// aborted all the same.
const wordRehearsal = "rehearsal"

var errRehearsal = errors.New("tableflip: the parent has only rehearsed an upgrade: exit, and leave alone what is shared")

var errAborted = errors.New("tableflip: the parent has aborted the upgrade: exit, and leave alone what is shared")

var errUndone = errors.New("tableflip: the parent has undone the trial of this process: drain, exit, and leave alone what is shared")

// refuse notes that the parent stays in charge.
func (p *parent) refuse(why error) {
	p.refusal = why
	p.leaveElders()
	close(p.decided)
}

// leaveElders lets go of the elders before the parent, who must not take this process for a
// successor: it will be none, and may take its time to exit.
func (p *parent) leaveElders() {
	for _, e := range p.older {
		e.hangUp()
	}
}

// hearEnd is called when nothing more can be heard.
func (p *parent) hearEnd(err error) {
	// Whoever learns that the parent has exited finds these descriptors closed.
	p.verdict.Close()
	switch {
	case isClosed(p.decided):
	case errors.Is(err, io.EOF), errors.Is(err, os.ErrDeadlineExceeded):
		p.orphan = true
		close(p.decided)
	default:
		p.refuse(fmt.Errorf("tableflip: can't read the parent's verdict: %w", err))
	}
	if p.refusal == nil || p.onTrial.Load() {
		p.end()
		p.change()
	} else if p.handle != nil {
		p.handle.Close()
	}
}

// unread lets watch go on after the parent's process has ended, if the parent has said
// something before.
func (p *parent) unread() bool {
	readable, _, err := descriptor.PollOf(p.verdict)
	if !readable || err != nil {
		return false
	}
	// What is in the pipe can be read without waiting.
	return p.verdict.SetReadDeadline(time.Now().Add(time.Second)) == nil
}

// sayReady tells the parent that this process can serve.
func (p *parent) sayReady() {
	_ = p.say(wordReady)
	if p.isUpstream() {
		p.readyOnce.Do(func() { close(p.isReady) })
	}
	step.Reached(step.ReadySaid)
}

// sayInCharge tells the elders before the parent that this process is in charge now.
func (p *parent) sayInCharge(number int) {
	for _, e := range p.older {
		pid := ownPID()
		if e.generation.PID == 0 { // nor would it know this one
			pid = "-"
		}
		_ = e.say(wordSucceeded, pid, strconv.Itoa(number))
	}
}

// takeCharge acknowledges the parent's commit, between which and the acknowledgement
// it calls prepare, whose effect the parent can undo. If it returns an error, this
// process must leave.
func (p *parent) takeCharge(prepare func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if isClosed(p.aborted) {
		p.abandonLocked(errAborted)
		return errAborted
	}

	if err := prepare(); err != nil {
		if p.orphan {
			return err // the caller may try again
		}
		_ = p.say(wordFailed, oneLine(err))
		p.abandonLocked(err)
		return err
	}
	if p.commit {
		aborted := isClosed(p.aborted)
		if !aborted && p.say(wordAcknowledged) != nil {
			// Nobody listens any more. If the parent lives, it has said why.
			select {
			case <-p.aborted:
				aborted = true
			case <-p.exited:
				aborted = isClosed(p.aborted)
			}
		}
		if aborted {
			p.abandonLocked(errAborted)
			return errAborted
		}
		step.Reached(step.Acknowledged)
	}
	p.inCharge = true
	return nil
}

var errAbandoned = errors.New("tableflip: the upgrade that started this process was abandoned by Stop: exit, and leave alone what is shared")

// abandon gives up, unless this process is in charge, which it reports. From then on
// the parent cannot commit, or gets no acknowledgement of its commit. The
// parent is told why, unless that is nil.
func (p *parent) abandon(why error) (inCharge bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.inCharge || p.diedUndecided() {
		return true
	}
	switch {
	case p.abandoned != nil:
		return false
	case why != nil:
		_ = p.say(wordFailed, oneLine(why))
	case p.onTrial.Load():
		_ = p.say(wordStopping)
	}
	p.abandonLocked(errAbandoned)
	return false
}

// diedUndecided reports whether this process is an orphan.
func (p *parent) diedUndecided() bool { return isClosed(p.decided) && p.orphan }

func (p *parent) abandonLocked(why error) {
	p.abandoned = why
	close(p.leaves)
	p.leaveElders()
	if p.onTrial.Load() {
		return // it drains, and the parent waits for its end
	}
	p.hangUp()
	p.verdict.Close()
}

// wait returns once all earlier generations have ended, and an error if the parent did
// not put this process in charge, or ctx is done.
func (p *parent) wait(ctx context.Context) error {
	events := []<-chan struct{}{p.decided, p.exited}
	for _, e := range p.older {
		events = append(events, e.exited)
	}
	for _, event := range events {
		select {
		case <-event:
		case <-p.leaves:
			return p.abandonment()
		case <-ctx.Done():
			return fmt.Errorf("tableflip: wait for the parent: %w", context.Cause(ctx))
		}
		if p.refusal != nil {
			return p.refusal
		}
	}
	return p.abandonment()
}

// abandonment returns why this process will never be in charge, or nil if it may be.
func (p *parent) abandonment() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.abandoned
}

// isInCharge reports whether this process has taken charge.
func (p *parent) isInCharge() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.inCharge
}

// hasExited reports whether the parent's process has ended.
func (p *parent) hasExited() bool {
	return isClosed(p.exited) || p.isInCharge() && p.hasEnded()
}

// An elder is an earlier generation, seen by one that came after it. Whoever is in charge
// speaks to all elders, whose pipes it has from its parent, but hears them only end: what
// an elder says is for its child.
type elder struct {
	generation Generation      // guarded by Upgrader.mu, except PID and Number
	isTold     bool            // its end, by the parent while that was in charge; guarded by Upgrader.mu
	ready      *os.File        // whose end tells the elder that no successor lives
	verdict    *os.File        // whose end is that of the elder's process
	handle     *process.Handle // of the process, nil where there are none

	sayHurry   sync.Once
	closeReady sync.Once

	processEnded chan struct{} // closed by watchProcess
	exited       chan struct{} // closed once the process has ended
}

// The descriptors of an elder, as they are passed on.
const (
	elderKind    = "earlier"
	elderReady   = "ready"
	elderVerdict = "verdict"
	elderProcess = "process"
)

// passOn returns what a child needs to watch e and to speak to it, which the caller
// closes, and nothing if e has just ended.
func (e *elder) passOn() (entries []*nametable.Entry, fds []uintptr, err error) {
	add := func(network string, duplicate func() (uintptr, error)) {
		var fd uintptr
		if err != nil {
			return
		}
		if fd, err = duplicate(); err != nil {
			return
		}
		fds = append(fds, fd)
		entries = append(entries, &nametable.Entry{
			Name:      nametable.Name{Kind: elderKind, Network: network, Addr: strconv.Itoa(e.generation.Number)},
			BoundAddr: strconv.Itoa(e.generation.PID),
			Path:      strconv.FormatInt(e.generation.Since.UnixMilli(), 10),
		})
	}
	add(elderReady, func() (uintptr, error) { return descriptor.DuplicateOf(e.ready) })
	add(elderVerdict, func() (uintptr, error) { return descriptor.DuplicateOf(e.verdict) })
	if e.handle != nil {
		add(elderProcess, e.handle.Duplicate)
	}
	if err == nil {
		return entries, fds, nil
	}
	for _, fd := range fds {
		_ = descriptor.Close(fd)
	}
	if descriptor.IsClosed(err) {
		err = nil
	}
	return nil, nil, err
}

// adoptElder adds a descriptor that an entry describes to the elders, or reports that it
// can't. Those of one elder follow each other.
func adoptElder(elders []*elder, entry *nametable.Entry, fd uintptr, knowsPIDs bool) ([]*elder, bool) {
	number, err := strconv.Atoi(entry.Addr)
	if err != nil || entry.Kind != elderKind {
		return elders, false
	}
	if n := len(elders); n == 0 || elders[n-1].generation.Number != number {
		pid, _ := strconv.Atoi(entry.BoundAddr)
		if !knowsPIDs {
			pid = 0
		}
		since, _ := strconv.ParseInt(entry.Path, 10, 64)
		elders = append(elders, &elder{
			generation:   Generation{pid, number, time.UnixMilli(since), stateDraining},
			processEnded: make(chan struct{}),
			exited:       make(chan struct{}),
		})
	}
	e := elders[len(elders)-1]
	switch {
	case entry.Network == elderReady && e.ready == nil && descriptor.SetNonblock(fd, true) == nil:
		e.ready = os.NewFile(fd, "ready")
	case entry.Network == elderVerdict && e.verdict == nil && descriptor.SetNonblock(fd, true) == nil:
		e.verdict = os.NewFile(fd, "verdict")
	case entry.Network == elderProcess && e.handle == nil:
		e.handle, err = process.Inherited(fd)
		return elders, err == nil
	default:
		return elders, false
	}
	return elders, true
}

// discard closes what there is of an elder that is not watched.
func (e *elder) discard() {
	e.ready.Close()
	e.verdict.Close()
	if e.handle != nil {
		e.handle.Close()
	}
}

// sayTimeout bounds what is said to a process that has been suspended for so long that its
// pipe is full.
const sayTimeout = time.Second

func (e *elder) say(words ...string) error {
	_ = e.ready.SetWriteDeadline(time.Now().Add(sayTimeout))
	_, err := io.WriteString(e.ready, strings.Join(words, " ")+"\n")
	return err
}

// hurry tells the process that its place is needed.
func (e *elder) hurry() {
	e.sayHurry.Do(func() { _ = e.say(wordHurry) })
}

// hangUp leaves it to others to tell the process that a successor lives.
func (e *elder) hangUp() {
	e.closeReady.Do(func() { e.ready.Close() })
}

// watch returns when the process has ended.
func (e *elder) watch() {
	if e.handle != nil {
		go e.watchProcess()
	}
	_ = descriptor.AwaitHangUp(e.verdict)
	e.verdict.Close()
	e.end()
}

// end is called when the process has closed its pipe.
func (e *elder) end() {
	if e.handle != nil {
		e.awaitProcess()
		e.handle.Close()
	}
	e.hangUp()
	close(e.exited)
}

// awaitProcess returns when the kernel has done away with a process that has closed the
// pipe. It closes descriptors one by one, and one after the pipe may hold a lock that
// this process wants. There is a limit because a process that executes another program
// closes the pipe, too.
func (e *elder) awaitProcess() {
	select {
	case <-e.processEnded:
	case <-time.After(5 * time.Second):
	}
}

// watchProcess ends what waits for the end of the pipe when the process has ended, which
// the pipe does not tell if another that the process has forked has it open.
func (e *elder) watchProcess() {
	if e.handle.Wait() == nil {
		close(e.processEnded)
		e.verdict.SetReadDeadline(time.Unix(1, 0))
	}
}

// hasEnded reports whether the process has ended. It asks the system, because the
// goroutines that watch may not have run yet since.
func (e *elder) hasEnded() bool {
	if isClosed(e.exited) || e.handle != nil && e.handle.Ended() {
		return true
	}
	_, hungUp, err := descriptor.PollOf(e.verdict)
	return hungUp || descriptor.IsClosed(err)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// maxReason keeps a reason below the parent's maxLine.
const maxReason = 1000

// oneLine makes the text of err fit into a line of words.
func oneLine(err error) string {
	text := strings.ToValidUTF8(err.Error(), "\uFFFD")
	text = strings.Join(strings.FieldsFunc(text, unicode.IsControl), " ")
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "…"
	}
	return text
}
