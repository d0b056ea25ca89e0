//go:build linux

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing/fstest"
	"time"

	"example.com/tableflip/benchmarks/launch"
)

// This file is how services are started, and new versions are deployed.

// The versions are also the names of the directories with their binaries.
const (
	good = "good"
	bad  = "bad"
)

// A service has its binary, and what it writes, in dir.
type service struct {
	row
	built, dir, addr string
}

func (s *service) binary() string { return filepath.Join(s.dir, "server") }

func (s *service) paths() (addr, crashes string) { return s.addr, filepath.Join(s.dir, "crashes") }

func (s *service) command() []string {
	addr, crashes := s.paths()
	return append([]string{s.binary(), "-addr", addr, "-crashes", crashes}, s.args...)
}

// install puts a version in the place of the one that is there.
func (s *service) install(version string) error {
	from, err := os.Open(filepath.Join(s.built, version, s.program))
	if err != nil {
		return err
	}
	defer from.Close()
	// A process that another measurement starts meanwhile would have the binary open for
	// writing, and nobody can execute it then.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	to, err := os.OpenFile(s.binary()+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	if err := errors.Join(err, to.Close()); err != nil {
		return err
	}
	return os.Rename(s.binary()+".new", s.binary())
}

// A process is a service that a shell or tableflip-supervise has started.
type process struct {
	service
	first *exec.Cmd
	ended <-chan struct{} // closed when first has ended
}

func (p *process) start() error {
	if err := errors.Join(p.stop(), p.install(good)); err != nil {
		return err
	}
	command := p.command()
	if p.under == superior {
		command = append([]string{filepath.Join(p.built, good, "tableflip-supervise"), "--"}, command...)
	}
	cmd := exec.Command(command[0], command[1:]...)
	ended, err := launch.Start(cmd, p.dir)
	if err != nil {
		return err
	}
	p.first, p.ended = cmd, ended
	return nil
}

// deploy signals the process that answers, or the master process.
func (p *process) deploy() error {
	if err := p.install(bad); err != nil {
		return err
	}
	signal := cmp.Or(p.signal, syscall.SIGHUP)
	if p.master {
		return p.first.Process.Signal(signal)
	}
	pid, err := ask(p.addr)
	if err != nil {
		return err
	}
	return syscall.Kill(pid, signal)
}

// oneShot leaves no connection that a drain would wait for.
var oneShot = http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// ask returns who answers.
func ask(addr string) (pid int, err error) {
	resp, err := oneShot.Get("http://" + addr)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = fmt.Fscan(resp.Body, &pid)
	return pid, err
}

// stop ends what is left of the service.
func (p *process) stop() error {
	if p.first == nil {
		return nil
	}
	if p.under != superior {
		syscall.Kill(-p.first.Process.Pid, syscall.SIGKILL)
	}
	p.first.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		return nil
	case <-time.After(20 * time.Second):
		return fmt.Errorf("process %d does not end", p.first.Process.Pid)
	}
}

// A unit is a service under systemd.
type unit struct{ service }

func (u *unit) files() fs.FS {
	// With the limit that is the default, the fifth crash would be the end.
	files := fstest.MapFS{"server.service": {Data: []byte("[Unit]\nStartLimitIntervalSec=0\n[Service]\nRestart=always\n" +
		u.row.unit + "ExecStart=" + strings.Join(u.command(), " ") + "\n")}}
	if u.socket != "" {
		files["server.socket"] = &fstest.MapFile{Data: []byte("[Socket]\n" + u.socket)}
	}
	return files
}

func (u *unit) start() error {
	if err := u.install(good); err != nil {
		return err
	}
	if u.socket != "" {
		return systemctl("start", "server.socket")
	}
	return systemctl("start", "server.service")
}

func (u *unit) deploy() error {
	if err := u.install(bad); err != nil {
		return err
	}
	return systemctl(u.row.deploy, "server.service")
}

func systemctl(args ...string) error {
	output, err := exec.Command("systemctl", append([]string{"--user"}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("systemctl %v: %w: %s", args, err, output)
	}
	return nil
}
