package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// This file owns the server's processes: it starts the first, replaces it, and
// leaves none. Only the first is a child of this process. But all of them are in one
// process group, by which they are stopped, and all of them have the write end of one
// pipe as their standard error. The end of the pipe tells that they are gone, including
// those that this process does not know.

// Bounds are how long the server may take. Nothing does unless it is broken.
type bounds struct {
	start time.Duration // from the start, or the request for an upgrade, to ready
	drain time.Duration // from there to the end of the old process
	stop  time.Duration // from SIGTERM to the end of all
}

var usualBounds = bounds{
	start: 30 * time.Second,
	drain: 40 * time.Second, // longer than the server's own bound, -drain
	stop:  10 * time.Second,
}

// An identity is what a process of the server answers with.
type identity struct {
	version string
	pid     int
}

// A generation is one process of the server. Times that have not come are zero.
type generation struct {
	identity
	asked     time.Time     // when this process was asked for
	listening time.Time     // when it had the listener, right before it took charge
	took      time.Duration // how long its parent's call of Upgrade took, 0 for the first
	alone     time.Time     // when its parent was found to have exited
}

type server struct {
	dir         string
	bounds      bounds
	first       *exec.Cmd
	addr        string
	log         *serverLog
	generations []generation
}

func (s *server) binary() string  { return filepath.Join(s.dir, "server") }
func (s *server) pidFile() string { return filepath.Join(s.dir, "server.pid") }
func (s *server) socket() string  { return filepath.Join(s.dir, "ctl") }

// startServer copies the binary into dir, starts it, and returns once it is
// ready. dir must be for it alone.
func startServer(ctx context.Context, dir, binary, version string, bounds bounds) (*server, error) {
	s := &server{dir: dir, bounds: bounds}
	if err := s.install(binary); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, bounds.start, fmt.Errorf("it was not ready in %v", bounds.start))
	defer cancel()
	began := time.Now()
	if err := s.start(); err != nil {
		return nil, fmt.Errorf("can't start the server: %w", err)
	}
	err := s.awaitFirst(ctx, version, began)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start the server: %w%s", err, s.log.tail()), s.stop())
	}
	return s, nil
}

func (s *server) start() error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer write.Close()
	// On port 0 the kernel chooses one that is free, and it is the library's
	// promise that it stays the same. To look for a free one here first would
	// leave others a moment to take it.
	s.first = exec.Command(s.binary(), "-listen", "127.0.0.1:0", "-pid-file", s.pidFile(), "-control", s.socket())
	s.first.Stdout, s.first.Stderr = write, write
	// Ctrl-C is for this process, which stops its clients first.
	inOwnGroup(s.first)
	if err := s.first.Start(); err != nil {
		read.Close()
		return err
	}
	s.log = readLog(read)
	go s.first.Wait()
	return nil
}

func (s *server) awaitFirst(ctx context.Context, version string, began time.Time) error {
	if _, err := s.log.await(ctx, 0, "ready"); err != nil {
		return err
	}
	listening, err := s.log.await(ctx, 0, "listening")
	if err != nil {
		return err
	}
	pid, err := s.readPID()
	if err != nil {
		return err
	}
	if pid != s.first.Process.Pid {
		return fmt.Errorf("its PID file says %d, but it has the PID %d", pid, s.first.Process.Pid)
	}
	s.addr = listening.value["addr"]
	s.generations = []generation{{identity: identity{version, pid}, asked: began, listening: listening.time(), alone: began}}
	return nil
}

// install puts a copy of binary where the next process is started from. The
// rename leaves no moment at which there is none, or half of one.
func (s *server) install(binary string) error {
	from, err := os.Open(binary)
	if err != nil {
		return err
	}
	defer from.Close()
	temporary := s.binary() + ".new"
	to, err := os.OpenFile(temporary, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	if err := errors.Join(err, to.Close()); err != nil {
		return err
	}
	return os.Rename(temporary, s.binary())
}

// upgrade has the server replace itself by what is installed, and returns once
// the old process has exited, which is when the next upgrade is possible. It adds
// to s.generations also if it fails.
func (s *server) upgrade(ctx context.Context, version string) (generation, error) {
	s.generations = append(s.generations, generation{identity: identity{version: version}, asked: time.Now()})
	next := &s.generations[len(s.generations)-1]
	err := s.replace(ctx, next)
	if err == nil {
		err = s.awaitExit(ctx, s.generations[len(s.generations)-2].pid)
	}
	if err == nil {
		next.alone = time.Now()
	}
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w%s", err, s.log.tail())
	}
	return *next, err
}

func (s *server) replace(ctx context.Context, next *generation) error {
	ctx, cancel := context.WithTimeoutCause(ctx, s.bounds.start, fmt.Errorf("the server has not said in %v how it went", s.bounds.start))
	defer cancel()

	old := s.generations[len(s.generations)-2]
	pid, err := s.readPID()
	if err != nil {
		return err
	}
	if pid != old.pid {
		return fmt.Errorf("the PID file says %d instead of %d", pid, old.pid)
	}
	mark := s.log.len()
	if err := s.askUpgrade(ctx); err != nil {
		return err
	}
	outcome, err := s.log.await(ctx, mark, "upgrade succeeded", "upgrade failed")
	if err != nil {
		return err
	}
	if outcome.value["msg"] == "upgrade failed" {
		return fmt.Errorf("the server says: %s", outcome.value["error"])
	}
	if next.took, err = time.ParseDuration(outcome.value["took"]); err != nil {
		return fmt.Errorf("can't tell how long it took: %w", err)
	}
	listening, err := s.log.await(ctx, mark, "listening")
	if err != nil {
		return err
	}
	next.listening = listening.time()
	if addr := listening.value["addr"]; addr != s.addr {
		return fmt.Errorf("the new process listens on %s instead of %s", addr, s.addr)
	}
	if next.pid, err = s.readPID(); err != nil {
		return err
	}
	if next.pid == old.pid {
		return fmt.Errorf("the PID file still says %d", old.pid)
	}
	return nil
}

// ctl returns a command that asks the service at its control socket. The server is its
// own client.
func (s *server) ctl(ctx context.Context, question string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.binary(), "-control", s.socket(), "-ctl", question)
	inOwnGroup(cmd)
	return cmd
}

// askUpgrade returns when the new process is in charge.
func (s *server) askUpgrade(ctx context.Context) error {
	output, err := s.ctl(ctx, "upgrade").CombinedOutput()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("the server says: %s", strings.TrimSpace(string(output)))
	}
	return nil
}

// watch has show called for each step of the upgrades, until stop is called.
func (s *server) watch(show func(step string)) (stop func(), err error) {
	ctx, cancel := context.WithCancel(context.Background())
	cmd := s.ctl(ctx, "events")
	steps, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("can't watch the server: %w", err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for lines := bufio.NewScanner(steps); lines.Scan(); {
			show(lines.Text())
		}
		cmd.Wait()
	}()
	return func() { cancel(); <-ended }, nil
}

// awaitExit polls, because the process need not be a child of this one.
func (s *server) awaitExit(ctx context.Context, pid int) error {
	ctx, cancel := context.WithTimeoutCause(ctx, s.bounds.drain, fmt.Errorf("the old process, %d, has not exited in %v", pid, s.bounds.drain))
	defer cancel()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for running(pid) {
		select {
		case <-poll.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// run lets the server serve for some time.
func (s *server) run(ctx context.Context, interval time.Duration) error {
	select {
	case <-time.After(interval):
		return nil
	case <-s.log.ended:
		return fmt.Errorf("%w%s", errGone, s.log.tail())
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stop returns once all processes of the server have ended, also those that are
// starting or draining. It kills those that take longer than it should, which is
// an error.
func (s *server) stop() error {
	group := s.first.Process.Pid
	if s.log.hasEnded() {
		return nil
	}
	// Errors say that nobody is left, which the log will tell too.
	_ = terminateGroup(group)
	if s.log.endsIn(s.bounds.stop) {
		return nil
	}
	_ = killGroup(group)
	if s.log.endsIn(s.bounds.stop) {
		return fmt.Errorf("the server did not stop in %v, and was killed%s", s.bounds.stop, s.log.tail())
	}
	return fmt.Errorf("the server did not stop in %v, and its process group, %d, can't be killed", s.bounds.stop, group)
}

func (s *server) readPID() (int, error) {
	content, err := os.ReadFile(s.pidFile())
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("the PID file holds %q", content)
	}
	return pid, nil
}

// errGone is the error of waits for a server that has no process any more.
var errGone = errors.New("the server has ended by itself")
