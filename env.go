package tableflip

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/registry"
	"example.com/tableflip/internal/systemd"
	"example.com/tableflip/internal/upstream"
)

// This file decides what this process inherits. The variables that were found in the
// environment at its start are a table whose descriptors are there, one whose descriptors
// were lost on the way, or one that has leaked from another process. Without a table, the
// service manager may have passed sockets.

// inherited is the parent of this process, for the Upgraders after the first one. It
// is guarded by upgraderExists.
var inherited *parent

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
		// An earlier Upgrader of this process has taken all descriptors.
		if err := inherited.abandonment(); err != nil {
			return nil, nil, err
		}
		r, err := registry.New(registryOpts, inherit.FirstFD, nil)
		return r, inherited, err
	}

	inherit.ForgetUpstream()
	t, err := findTable()
	if err != nil {
		return nil, nil, err
	}
	if t == nil {
		theirs, err := upstream.Find()
		if err != nil {
			return nil, nil, err
		}
		if theirs != nil {
			return takeOverUpstream(registryOpts, theirs)
		}
		r, err := takeOverActivated(registryOpts)
		return r, nil, err
	}
	entries := ownEntries(t.Entries)
	r, err := registry.New(registryOpts, inherit.FirstFD, entries)
	if err != nil {
		return nil, nil, err
	}
	others, first := t.Entries[len(entries):], inherit.FirstFD+uintptr(len(entries))
	inherited, err = newParent(t, adoptVerdict(others, first))
	if err != nil {
		return nil, nil, err
	}
	inherited.adopt(others, first)
	inherit.Forget()
	return r, inherited, nil
}

// takeOverUpstream inherits what a parent left that uses cloudflare/tableflip.
func takeOverUpstream(opts registry.Options, theirs *upstream.Parent) (*registry.Registry, *parent, error) {
	var entries []*nametable.Entry
	for _, name := range theirs.Names {
		entries = append(entries, &nametable.Entry{Name: name})
	}
	r, err := registry.New(opts, inherit.FirstFD, entries)
	if err == nil {
		err = r.DescribeAll()
	}
	if err != nil {
		return nil, nil, err
	}
	inherited = newUpstreamParent(theirs)
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

// adoptVerdict returns the verdict pipe, which may be among the descriptors of entries. Then
// descriptor 4 has the names for a child with the other library, and is closed.
func adoptVerdict(entries []*nametable.Entry, first uintptr) uintptr {
	i := slices.IndexFunc(entries, isVerdictPipe)
	if i < 0 {
		return inherit.VerdictFD
	}
	_ = descriptor.Close(inherit.VerdictFD)
	return first + uintptr(i)
}

// adopt takes over the handle of the parent's process and the elders, as far as they are
// among the descriptors of entries, which are open from first on. It closes the others,
// which come from a later version of this package, and what there is of an incomplete elder.
func (p *parent) adopt(entries []*nametable.Entry, first uintptr) {
	for i, e := range entries {
		fd, adopted := first+uintptr(i), isVerdictPipe(e)
		if adopted {
			continue // by adoptVerdict
		}
		if e.Name == parentHandle && p.handle == nil {
			handle, err := process.Inherited(fd)
			if adopted = err == nil; adopted {
				p.handle = handle
			}
		} else {
			p.older, adopted = adoptElder(p.older, e, fd, p.generation.PID != 0)
		}
		if !adopted {
			_ = descriptor.Close(fd)
		}
	}
	p.older = slices.DeleteFunc(p.older, func(e *elder) bool {
		if e.ready != nil && e.verdict != nil {
			return false
		}
		e.discard()
		return true
	})
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
	return r, systemd.ForgetActivatedFDs()
}

// findTable returns the table of this process, or nil if there is none.
func findTable() (*nametable.Table, error) {
	variables := inherit.Variables()
	if variables == nil {
		if inherit.Lost() {
			return nil, errors.New("tableflip: this process has executed its program anew, after the package had taken " +
				"what the parent passed on: have Options.Command start what is to be executed")
		}
		return nil, nil
	}

	t, err := nametable.Decode(variables)
	var version nametable.UnknownVersionError
	if err != nil && !errors.As(err, &version) {
		return nil, err
	}
	if hasPipes(&t) {
		return &t, err
	}
	// A parent with the other library leaks the table that one of ours has passed to it.
	if theirs, _ := upstream.Find(); theirs == nil && isAwaited(&t) {
		return nil, fmt.Errorf("tableflip: process %d waits for this one, and has passed %d descriptors on to it "+
			"that did not arrive: have what starts the service (a shell script, sudo, a daemon tool) keep descriptors from %d on open, "+
			"or name the binary itself by Options.Command", t.PID, len(t.Entries)+2, inherit.ReadyFD)
	}
	inherit.Forget()
	return nil, nil
}

// hasPipes reports whether the pipes that the table names are there.
func hasPipes(t *nametable.Table) bool {
	ready, readyErr := identifyPipe(inherit.ReadyFD)
	verdict, verdictErr := identifyPipe(inherit.VerdictFD)
	if readyErr != nil || verdictErr != nil {
		return false
	}
	for _, pipe := range []struct{ got, want nametable.PipeID }{{ready, t.Ready}, {verdict, t.Verdict}} {
		if pipe.want != (nametable.PipeID{}) && pipe.got != pipe.want {
			return false
		}
	}
	switch {
	case slices.ContainsFunc(t.Entries, isVerdictPipe):
		// There is no token, because a child with the other library would find it among
		// the names. Where it is missed, no wrapper may have started this process.
		isUnique := descriptor.UniquePipes && t.Ready != (nametable.PipeID{})
		return isUnique || t.PID == os.Getppid()
	case inherit.HasUpstream():
		return false // descriptor 4 is not the verdict pipe
	}
	return t.Token == "" || readToken(len(t.Token)) == t.Token
}

// token is what readToken has read, for a New that is called again after an error. It
// is guarded by upgraderExists.
var token string

// readToken returns what the parent has written to the verdict pipe.
func readToken(size int) string {
	if readable, _ := descriptor.Poll(inherit.VerdictFD); token == "" && readable {
		content := make([]byte, size)
		n, _ := syscall.Read(inherit.VerdictFD, content)
		token = string(content[:max(n, 0)])
	}
	return token
}

func identifyPipe(fd uintptr) (nametable.PipeID, error) {
	device, inode, err := descriptor.IdentifyPipe(fd)
	return nametable.PipeID{Device: device, Inode: inode}, err
}

// isAwaited reports whether the sender of the table still waits for its child, and
// this process could be that: a descendant, or a sibling that it started as a child
// of its parent.
func isAwaited(t *nametable.Table) bool {
	if t.PID == 0 || t.PIDNamespace != process.PIDNamespace() || time.Now().After(t.Until) || !process.IsAlive(t.PID) {
		return false
	}
	parent := os.Getppid()
	if isAncestor(t.PID) || process.Parent(t.PID) == parent {
		return true
	}
	// Without /proc nothing tells the parent's parent. But a table is passed down, and so
	// came from an ancestor, unless this process has become init's child.
	return parent != 1 && process.Parent(parent) == 0
}

// isAncestor reports whether a process is known to be this one, or to have started it
// or one of its ancestors.
func isAncestor(ancestor int) bool {
	for pid := os.Getpid(); pid > 1; pid = process.Parent(pid) {
		if pid == ancestor {
			return true
		}
	}
	return ancestor == 1
}
