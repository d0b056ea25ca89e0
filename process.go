package tableflip

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/process"
)

// This file owns what is started by an upgrade, and whether it may be. How a process is
// started and killed, and what this process was started with, is in internal/process.

// newCommand describes a process that is started as this one was. customize, which may
// be nil, can change everything except ExtraFiles.
func newCommand(customize func(*exec.Cmd)) (*exec.Cmd, error) {
	path, pathErr := process.Path()
	stdin, stdout, stderr := process.Streams()
	cmd := &exec.Cmd{
		Path:   path,
		Args:   process.Args(),
		Env:    os.Environ(),
		Dir:    process.Dir(),
		Stdin:  stdin,
		Stdout: stdout,
		Stderr: stderr,
		// If customize chose an output that is not a file, a descendant that
		// holds it open must not keep a dead process from being reaped.
		WaitDelay: 500 * time.Millisecond,
	}
	if customize != nil {
		customize(cmd)
	}
	switch {
	case cmd.Path == "" && pathErr != nil:
		return nil, pathErr
	case cmd.Path == "":
		return nil, errors.New("tableflip: Options.Command has cleared the path of the new binary")
	case len(cmd.ExtraFiles) > 0:
		return nil, errors.New("tableflip: Options.Command set ExtraFiles: pass files on by AddFile instead")
	}
	if cmd.Env != nil && strings.HasPrefix(cmd.Dir, "/") {
		// So that the new process knows the directory by this name, too. Os/exec
		// does that if Env is nil.
		cmd.Env = append(cmd.Env, "PWD="+cmd.Dir)
	}
	return cmd, nil
}

// checkSupervision returns an error if it is certain that whoever has started the
// service would end it with this process, because it can't learn of another.
func (u *Upgrader) checkSupervision() error {
	switch {
	case os.Getpid() == 1:
		return errors.New("tableflip: this process is PID 1, and the kernel ends all other processes of its PID namespace with it: " +
			"have tableflip-supervise start the service")
	case u.pidFile.IsNone() && u.managerEnv.WatchesFirst():
		return errors.New("tableflip: systemd ends the service with this process, because it can't learn of the next one: " +
			"set Type=notify in the unit, or PIDFile= there and in Options.PIDFile")
	}
	return nil
}

// startChild starts the new process.
func (u *Upgrader) startChild(a *attempt) (*child, error) {
	cmd, err := newCommand(u.command)
	if err != nil {
		return nil, err
	}
	u.warnOf(cmd)
	// Whoever has cancelled the upgrade meanwhile may not want it started.
	if err := a.err(); err != nil {
		return nil, err
	}
	until := a.until(u.upgradeTimeout)

	entries, fds, release, err := u.registry.FreezeForChild()
	if err != nil {
		return nil, fmt.Errorf("%w%s", err, process.LimitHint(err))
	}
	defer release()
	if self, err := process.OpenSelf(); err == nil {
		defer descriptor.Close(self)
		entries = append(entries, &nametable.Entry{Name: parentHandle})
		fds = append(fds, self)
	}
	for _, e := range u.earlier() {
		more, duplicates, err := e.passOn()
		if err != nil {
			return nil, fmt.Errorf("tableflip: pass on an earlier generation: %w%s", err, process.LimitHint(err))
		}
		defer func() {
			for _, fd := range duplicates {
				_ = descriptor.Close(fd)
			}
		}()
		entries, fds = append(entries, more...), append(fds, duplicates...)
	}
	u.mu.Lock()
	table := nametable.Table{Until: until, Generation: u.number, Since: u.since, Entries: entries}
	u.mu.Unlock()
	c, err := startChild(a.ctx, cmd, u.managerEnv, table, fds, u.compat)
	if err != nil {
		return nil, err
	}
	a.limit(until, u.upgradeTimeout) // setting a timer is not for the way to the start
	a.hasChild = true
	note := func(name string) {
		u.mu.Lock()
		u.successor = &Generation{c.pid, u.number + 1, a.began, stateStarting}
		u.mu.Unlock()
		u.tell(a, slog.LevelInfo, name)
	}
	c.hereHeard = func() { note(event.Here) }
	note(event.Started)
	return c, nil
}

// warnOf logs what may make an upgrade useless.
func (u *Upgrader) warnOf(cmd *exec.Cmd) {
	if u.logger == nil {
		return
	}
	if process.IsStaleMount(cmd.Path) {
		u.logger.Warn("tableflip: the binary is mounted by itself, and the file that was mounted has been replaced: this starts the old one; mount its directory", "path", cmd.Path)
	}
	if name := process.ContainerInit(); name != "" {
		u.logger.Warn("tableflip: PID 1 ends the container with the process that it has started, which may be this one: have tableflip-supervise start the service", "init", name)
	}
	if u.notifier == nil && u.pidFile.IsNone() && u.managerEnv.IsParent() {
		u.logger.Warn("tableflip: systemd may end the service with this process, because it can't learn of the next one: set Type=notify in the unit, or PIDFile= there and in Options.PIDFile")
	}
}

func ownPID() string { return strconv.Itoa(os.Getpid()) }
