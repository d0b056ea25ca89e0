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
	"strings"
	"sync"
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
	wordStopping     = "stopping"     // in charge, it was told to stop: its end is no crash
)

// wordUpstream stands for what a child with the other library says when it is ready.
const wordUpstream = "*"

// The parent's words, on the verdict pipe.
const (
	wordCommit   = "commit"   // the child is to take charge
	wordAbort    = "abort"    // WORD…: it is not, and must leave
	wordNotified = "notified" // the service manager knows the child
	wordReload   = "reload"   // the manager asked the parent for a reload after the commit
	wordUpgrade  = "upgrade"  // so did somebody for an upgrade, which the child is to make
)

// offers are the words beyond the handover itself that this version knows. A parent
// offers them in the table, and a child accepts what it knows of them when it says that
// it is here. Neither says a word that was not accepted.
var offers = []string{wordReload, wordUpgrade}

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
	generation Generation // guarded by Upgrader.mu

	ready   *os.File
	verdict *os.File
	handle  *process.Handle // of the parent's process, nil where there are none

	closeReady sync.Once
	listenOnce sync.Once
	asked      func(word string) // called for wordReload and wordUpgrade

	decided chan struct{} // closed once one of these is true:
	commit  bool          // the parent has put this process in charge, if it acknowledges that
	refusal error         // the parent stays in charge
	orphan  bool          // the parent died before it decided

	isReady      chan struct{} // nil unless the parent uses the other library: closed by sayReady
	readyOnce    sync.Once     // for isReady
	processEnded chan struct{} // closed by watchProcess

	aborted  chan struct{} // closed if the parent takes the commit back
	exited   chan struct{} // closed once the parent's process has ended, and then:
	notified bool          // it had told the service manager that this is the main process

	mu        sync.Mutex
	inCharge  bool  // this process has acknowledged the commit, or is an orphan
	abandoned error // why it never will be
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
		ready:   os.NewFile(inherit.ReadyFD, "ready"),
		verdict: verdict,
		decided: make(chan struct{}),
		aborted: make(chan struct{}),
		exited:  make(chan struct{}),

		processEnded: make(chan struct{}),
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

// listen begins to listen to the parent, once.
func (p *parent) listen(asked func(word string)) {
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
	})
}

func (p *parent) say(words ...string) error {
	if p.isUpstream() {
		if words[0] != wordAcknowledged {
			return nil
		}
		_, err := p.ready.Write([]byte{upstream.ReadyByte})
		return err
	}
	_, err := io.WriteString(p.ready, strings.Join(words, " ")+"\n")
	return err
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
	case word == wordAbort && !decided:
		p.refusal = errAborted
		if slices.Contains(words, wordRehearsal) {
			p.refusal = errRehearsal
		}
		close(p.decided)
	case word == wordAbort && p.commit && !isClosed(p.aborted):
		close(p.aborted)
	case word == wordNotified:
		p.notified = true
	case word == wordReload || word == wordUpgrade:
		p.asked(word)
	}
}

// wordRehearsal follows wordAbort after a rehearsal. A child that does not know it is
// aborted all the same.
const wordRehearsal = "rehearsal"

var errRehearsal = errors.New("tableflip: the parent has only rehearsed an upgrade: exit, and leave alone what is shared")

var errAborted = errors.New("tableflip: the parent has aborted the upgrade: exit, and leave alone what is shared")

// hearEnd is called when nothing more can be heard.
func (p *parent) hearEnd(err error) {
	// Whoever learns that the parent has exited finds these descriptors closed.
	p.verdict.Close()
	switch ended := errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded); {
	case ended && !isClosed(p.decided):
		p.orphan = true
		close(p.decided)
	case ended:
	case !isClosed(p.decided):
		p.refusal = fmt.Errorf("tableflip: can't read the parent's verdict: %w", err)
		close(p.decided)
	}
	if p.handle != nil {
		if p.refusal == nil {
			p.awaitProcess()
		}
		p.handle.Close()
	}
	if p.refusal == nil {
		p.closeReady.Do(func() { p.ready.Close() })
		close(p.exited)
	}
}

// awaitProcess returns when the kernel has done away with a process that has closed the
// pipe. It closes descriptors one by one, and one after the pipe may hold a lock that
// this process wants. There is a limit because a process that executes another program
// closes the pipe, too.
func (p *parent) awaitProcess() {
	select {
	case <-p.processEnded:
	case <-time.After(time.Second):
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

// watchProcess ends watch when the parent's process has ended, which the pipe does
// not tell if a process that the parent has forked has it open.
func (p *parent) watchProcess() {
	if p.handle.Wait() == nil {
		close(p.processEnded)
		p.verdict.SetReadDeadline(time.Unix(1, 0))
	}
}

// sayStopping tells a parent that still drains that this process was told to stop, so
// that nobody waits for the parent's end.
func (p *parent) sayStopping() { _ = p.say(wordStopping) }

// sayReady tells the parent that this process can serve.
func (p *parent) sayReady() {
	_ = p.say(wordReady)
	if p.isUpstream() {
		p.readyOnce.Do(func() { close(p.isReady) })
	}
	step.Reached(step.ReadySaid)
}

// takeCharge acknowledges the parent's commit, between which and the acknowledgement
// it calls prepare, whose effect the parent can undo. If it returns an error, this
// process must leave.
func (p *parent) takeCharge(prepare func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.inCharge:
		return nil
	case p.abandoned != nil:
		return p.abandoned
	case isClosed(p.aborted):
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
	if why != nil {
		_ = p.say(wordFailed, oneLine(why))
	}
	p.abandonLocked(errAbandoned)
	return false
}

// diedUndecided reports whether this process is an orphan.
func (p *parent) diedUndecided() bool { return isClosed(p.decided) && p.orphan }

func (p *parent) abandonLocked(why error) {
	p.abandoned = why
	p.closeReady.Do(func() { p.ready.Close() })
	p.verdict.Close()
}

// wait returns once the parent has exited, and an error if it did not put this process
// in charge, or ctx is done.
func (p *parent) wait(ctx context.Context) error {
	for _, event := range []<-chan struct{}{p.decided, p.exited} {
		select {
		case <-event:
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

// hasExited reports whether the parent's process has ended. It asks the system,
// because the goroutines that watch may not have run yet since.
func (p *parent) hasExited() bool {
	if isClosed(p.exited) {
		return true
	}
	if !p.isInCharge() {
		return false
	}
	if p.handle != nil && p.handle.Ended() {
		return true
	}
	_, hungUp, err := descriptor.PollOf(p.verdict)
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
	text = strings.Join(strings.FieldsFunc(text, func(r rune) bool {
		return unicode.IsSpace(r) || unicode.IsControl(r)
	}), " ")
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "…"
	}
	return text
}
