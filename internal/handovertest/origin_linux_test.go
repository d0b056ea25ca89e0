package handovertest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// A new process is started as its parent was, whatever the parent has changed since, and
// from the files that are there now.

func init() {
	// deployed changes what the next start must not depend on, and upgrades when it is told.
	proctest.Role("deployed", func() {
		w := proctest.OpenWire()
		dir := proctest.Must(filepath.EvalSymlinks(proctest.Must(os.Getwd())))
		binary := proctest.Must(os.Readlink("/proc/self/exe"))
		was := fmt.Sprint(filepath.Base(dir), " ", filepath.Base(filepath.Dir(binary)), " ", os.Args[1:])
		os.Args = os.Args[:1]
		os.Args[0] = "changed"
		proctest.Must(0, os.Chdir("/"))
		os.Unsetenv("PWD")

		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		proctest.Must(0, upg.WaitForParent(context.Background()))
		w.Report("serves", was)
		for {
			select {
			case <-upg.Exit():
				return
			case <-w.Orders():
				w.ReportError("upgraded", upg.Upgrade())
			}
		}
	})
}

// A deployment is a directory with releases, each with a program in it, and a link to
// the current one.
type deployment struct {
	*proctest.Service
	t            *testing.T
	dir, current string
}

func newDeployment(t *testing.T) *deployment {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	proctest.OK(t, err)
	d := &deployment{proctest.NewService(t), t, dir, filepath.Join(dir, "current")}
	d.release("1")
	return d
}

func (d *deployment) release(name string) {
	d.t.Helper()
	proctest.OK(d.t, os.Mkdir(filepath.Join(d.dir, name), 0o700))
	proctest.OK(d.t, os.Link(proctest.Must(os.Executable()), filepath.Join(d.dir, name, "program")))
	proctest.OK(d.t, os.Symlink(name, filepath.Join(d.dir, "next")))
	proctest.OK(d.t, os.Rename(filepath.Join(d.dir, "next"), d.current))
}

// start starts the current release under the name argv0.
func (d *deployment) start(argv0 string, env ...string) *proctest.Process {
	d.t.Helper()
	cmd := d.Command("deployed", append(env, d.Wire())...)
	cmd.Path = filepath.Join(d.current, "program")
	cmd.Args = []string{argv0, "serve", "-addr"}
	cmd.Dir = d.current
	d.Start(cmd)
	return d.Next()
}

// wantUpgrade upgrades p and returns the new process, which must be of this release.
func (d *deployment) wantUpgrade(p *proctest.Process, release string) *proctest.Process {
	d.t.Helper()
	p.Order("upgrade")
	if m := p.Await("upgraded"); m.Text != "" {
		d.t.Fatal(m.Text)
	}
	next := d.Next()
	if got, want := next.Await("serves").Text, release+" "+release+" [serve -addr]"; got != want {
		d.t.Errorf("directory, binary and arguments are %s, want %s", got, want)
	}
	return next
}

func (d *deployment) wantError(p *proctest.Process, parts ...string) {
	d.t.Helper()
	p.Order("upgrade")
	got := p.Await("upgraded").Text
	for _, want := range parts {
		if !strings.Contains(got, want) {
			d.t.Errorf("got %q, which does not contain %q", got, want)
		}
	}
}

// In a directory that was removed, no path is relative to anything.
func TestOriginRemoved(t *testing.T) {
	s := proctest.NewService(t)
	cmd := s.Command("relative-pid-file")
	cmd.Path, cmd.Dir = proctest.Must(os.Executable()), t.TempDir()
	proctest.Shell(`rmdir "$PWD" && exec "$0"`)(cmd)
	s.Start(cmd)
	if m := s.Await("new"); !strings.Contains(m.Text, `"pid" is relative`) {
		t.Errorf("New returned %s", m.Text)
	}
	if m := s.Await("new"); m.Text != "<nil>" {
		t.Errorf("without a PID file, New returned %s", m.Text)
	}
}

func init() {
	proctest.Role("relative-pid-file", func() {
		for _, path := range []string{"pid", ""} {
			proctest.Report("new", proctest.ErrorOf(tableflip.New(tableflip.Options{PIDFile: path})))
		}
	})
}

func TestOriginRelease(t *testing.T) {
	for _, test := range []struct {
		name  string
		argv0 func(*deployment) string
		env   func(*deployment) []string
	}{
		{
			"absolute",
			func(d *deployment) string { return d.current + "/program" },
			func(d *deployment) []string { return []string{"PWD=" + d.current} },
		},
		{
			"absolute, as systemd starts it",
			func(d *deployment) string { return d.current + "/program" },
			func(d *deployment) []string { return []string{"PWD="} },
		},
		{
			"relative",
			func(d *deployment) string { return "./program" },
			func(d *deployment) []string { return []string{"PWD=" + d.current} },
		},
		{
			"by PATH",
			func(d *deployment) string { return "program" },
			func(d *deployment) []string { return []string{"PWD=" + d.current, "PATH=" + d.current} },
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := newDeployment(t)
			p := d.start(test.argv0(d), test.env(d)...)
			p.Await("serves")
			p = d.wantUpgrade(p, "1")
			d.release("2")
			p = d.wantUpgrade(p, "2")
			proctest.OK(t, os.RemoveAll(filepath.Join(d.dir, "1")))
			d.wantUpgrade(p, "2")
		})
	}
}

// Nobody knows that the directory was meant as "current".
func TestOriginReleaseUnnamed(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	p := d.start("./program", "PWD=")
	p.Await("serves")
	d.release("2")
	old := filepath.Join(d.dir, "1")
	proctest.OK(t, os.RemoveAll(old))
	d.wantError(p, old, "create the working directory", "PWD")
}

func TestOriginStranger(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	other := t.TempDir()
	proctest.OK(t, os.WriteFile(filepath.Join(other, "program"), []byte("#!/bin/sh\nexit 7\n"), 0o700))
	p := d.start("program", "PWD="+d.current, "PATH="+other)
	p.Await("serves")
	for range 2 {
		d.wantError(p, "tableflip: ", filepath.Join(other, "program"), "another program", "Options.Command")
	}
}

func init() {
	// crowd has more listeners than fit under the limit of open files that it was
	// started with. It is started by a shell, which opens files itself.
	proctest.Role("crowd", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{Command: proctest.Shell(`exec "$0"`)}))
		for i := range 150 {
			proctest.Must(upg.Listen("unix", "@"+proctest.Arg()+strconv.Itoa(i)))
		}
		MustBeReady(upg)
		proctest.Must(0, upg.WaitForParent(context.Background()))
		generation, _ := strconv.Atoi(os.Getenv("CROWD_GENERATION"))
		proctest.Report("ready", generation)
		if generation < 2 {
			os.Setenv("CROWD_GENERATION", strconv.Itoa(generation+1))
			proctest.Must(0, upg.Upgrade())
		}
	})
}

func TestOriginLimit(t *testing.T) {
	t.Parallel()
	s := proctest.NewService(t)
	cmd := s.Command("crowd", proctest.WithArg(t.TempDir()))
	proctest.Shell(`ulimit -Sn 64 && exec "$0"`)(cmd)
	proctest.OK(t, cmd.Run())
	for generation := range 3 {
		if got := s.Await("ready").Text; got != strconv.Itoa(generation) {
			t.Errorf("generation %s is ready, want %d", got, generation)
		}
	}
}

func TestOriginRefused(t *testing.T) {
	for _, attr := range []syscall.SysProcAttr{
		{Pdeathsig: syscall.SIGTERM},
		{Cloneflags: syscall.CLONE_NEWPID},
	} {
		upg, s := NewParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) { cmd.SysProcAttr = &attr }}, "succeed")
		proctest.OK(t, upg.Ready())
		if err := upg.Upgrade(); err == nil || !strings.Contains(err.Error(), "Options.Command set ") {
			t.Errorf("%+v: got %v", attr, err)
		}
		attr = syscall.SysProcAttr{}
		proctest.OK(t, upg.Upgrade())
		s.Await("ready")
		upg.Stop()
	}
}

func init() {
	// moved has another PID file than its parent.
	proctest.Role("moved", func() {
		terminated := proctest.Terminated()
		upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: filepath.Join(proctest.Arg(), "new")}))
		MustBeReady(upg)
		proctest.Report("ready")
		<-terminated
		upg.Stop()
	})
}

func TestPIDFileMoves(t *testing.T) {
	dir := t.TempDir()
	upg, s := NewParent(t, tableflip.Options{PIDFile: filepath.Join(dir, "old")}, "moved", proctest.WithArg(dir))
	Upgrade(t, upg)
	child := s.Await("ready")
	if content, err := os.ReadFile(filepath.Join(dir, "new")); string(content) != strconv.Itoa(child.PID) {
		t.Errorf("the new PID file holds %q, %v, want %d", content, err, child.PID)
	}
	if content, err := os.ReadFile(filepath.Join(dir, "old")); err == nil {
		t.Errorf("the old PID file is there, and holds %q", content)
	}
	proctest.Terminate(t, child.PID)
	s.AwaitEnd()
}
