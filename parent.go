package tableflip

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/step"
)

// This file is the child's side of the conversation with its parent: it owns
// the write end of the ready pipe and the read end of the verdict pipe.

// The child's ends of the pipes, and the first descriptor after them.
const (
	readyDescriptor = 3 + iota
	verdictDescriptor
	firstDescriptor
)

// A parent is the process that started this one to be replaced by it.
type parent struct {
	ready     *os.File
	closeOnce sync.Once // for ready
	verdict   *os.File
	saidReady bool

	decided chan struct{} // closed once one of these is true:
	commit  bool          // the parent put this process in charge
	refusal error         // the parent stays in charge
	orphan  bool          // the parent died before it decided

	exited chan struct{} // closed once the parent's process has ended, and then:
	notified bool // it had told the service manager that this is the main process
}

// findTable returns the table that a parent left in the environment, or nil if
// this process is the first generation.
func findTable() (*nametable.Table, error) {
	variables, err := takeVariables()
	if variables == nil || err != nil {
		return nil, err
	}
	t, err := nametable.Decode(variables)
	var version nametable.UnknownVersionError
	if err != nil && !errors.As(err, &version) {
		return nil, err
	}

	ready, readyErr := identifyPipe(readyDescriptor)
	verdict, verdictErr := identifyPipe(verdictDescriptor)
	if readyErr != nil || verdictErr != nil || ready != t.Ready || verdict != t.Verdict {
		// The variables were meant for an ancestor of this process that is not
		// a generation of the same service.
		return nil, nil
	}
	return &t, err
}

func identifyPipe(fd uintptr) (nametable.PipeID, error) {
	device, inode, err := descriptor.IdentifyPipe(fd)
	return nametable.PipeID{Device: device, Inode: inode}, err
}

// newParent adopts the ends of the pipes and begins to listen to the parent.
func newParent() (*parent, error) {
	for _, fd := range []uintptr{readyDescriptor, verdictDescriptor} {
		if err := descriptor.SetCloseOnExec(fd); err != nil {
			return nil, fmt.Errorf("tableflip: inherit the pipes of the handover: %w", err)
		}
	}
	// This end of the pipe is shared with no one. Non-blocking, waiting for the
	// parent to exit takes no thread.
	if err := descriptor.SetNonblock(verdictDescriptor, true); err != nil {
		return nil, fmt.Errorf("tableflip: inherit the pipes of the handover: %w", err)
	}
	p := &parent{
		ready:   os.NewFile(readyDescriptor, "ready"),
		verdict: os.NewFile(verdictDescriptor, "verdict"),
		decided: make(chan struct{}),
		exited:  make(chan struct{}),
	}
	go p.watch()
	return p, nil
}

// watch waits for the verdict, and then for the parent to exit.
func (p *parent) watch() {
	defer p.verdict.Close()
	message := make([]byte, 1)
	_, err := p.verdict.Read(message)
	switch {
	case err == nil && message[0] == verdictCommit:
		p.commit = true
	case err == nil && message[0] == verdictAbort:
		p.refusal = errors.New("tableflip: the parent has aborted the upgrade: exit, and leave alone what is shared")
	case err == nil:
		p.refusal = fmt.Errorf("tableflip: the parent sent an unknown verdict, %q: exit, and leave alone what is shared", message)
	case errors.Is(err, io.EOF):
		p.orphan = true
	default:
		p.refusal = fmt.Errorf("tableflip: can't read the parent's verdict: %w", err)
	}
	close(p.decided)
	if p.refusal != nil {
		return
	}
	if err == nil {
		// Nothing follows a commit but managerNotified and the end of the file.
		n, _ := io.Copy(io.Discard, p.verdict)
		p.notified = n > 0
	}
	close(p.exited)
}

// sayReady tells the parent that this process serves. Whether the parent has
// heard shows in its verdict.
func (p *parent) sayReady() {
	p.saidReady = true
	_, _ = p.ready.Write(append(ownPID(), '\n'))
	step.Reached(step.ReadySaid)
}

// putInCharge reports whether this process is in charge by now.
func (p *parent) putInCharge() bool {
	select {
	case <-p.decided:
		return p.refusal == nil
	default:
		return false
	}
}

// hasExited reports whether the parent's process has ended. It asks the pipe, as
// watch may not have run yet since.
func (p *parent) hasExited() bool {
	select {
	case <-p.exited:
		return true
	default:
	}
	if !p.putInCharge() {
		return false
	}
	ended := false
	err := descriptor.Control(p.verdict, func(fd uintptr) error {
		ended = descriptor.AtEOF(fd)
		return nil
	})
	return ended || descriptor.IsClosed(err)
}

// waitAbandoned closes the ready pipe, which means giving up, and reports whether the parent has put this process in charge
// all the same. A parent that has heard that the child is ready decides at once,
// unless it is suspended.
func (p *parent) waitAbandoned() bool {
	p.closeReady()
	if p.saidReady {
		select {
		case <-p.decided:
		case <-time.After(time.Second):
		}
	}
	return p.putInCharge()
}

// closeReady ends this side of the conversation. Before Ready it means giving up.
func (p *parent) closeReady() {
	p.closeOnce.Do(func() { p.ready.Close() })
}
