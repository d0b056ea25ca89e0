//go:build unix

package handovertest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/proctest"
)

// These tests are about Options.Command, and about what is started.

// Whatever Command does to its argument, the next upgrade begins with this process's own
// arguments again.
func TestCommandSpoils(t *testing.T) {
	arguments := slices.Clone(os.Args)
	t.Cleanup(func() { copy(os.Args, arguments) })
	upg, err := tableflip.New(tableflip.Options{Command: func(cmd *exec.Cmd) {
		if !slices.Equal(cmd.Args, arguments) {
			t.Errorf("Args are %q, want %q", cmd.Args, arguments)
		}
		for i := range cmd.Args {
			cmd.Args[i] = "spoilt"
		}
		for i := range cmd.Env {
			cmd.Env[i] = "SPOILT=1"
		}
		proctest.Unstartable(cmd)
	}})
	proctest.OK(t, err)
	defer upg.Stop()
	proctest.OK(t, upg.Ready())
	for range 2 {
		proctest.WantError(t, "Upgrade", upg.Upgrade(), os.ErrNotExist)
	}
	if !slices.Equal(os.Args, arguments) {
		t.Errorf("os.Args are %q", os.Args)
	}
}

// Options.Command may bring back variables that New has removed.
func TestCommandForges(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, "TABLEFLIP_HANDOVER=garbage", "TABLEFLIP_HANDOVER_0=garbage", "TABLEFLIP_HANDOVER_7=garbage",
			inherit.Upstream+"=yes")
	}}, "tell-environment")
	Upgrade(t, upg)
	if m := s.Await("variables"); strings.Contains(m.Text, "garbage") {
		t.Errorf("the child found %s", m.Text)
	}
}

// Without an environment of its own, a command has this process's, as in package os/exec.
// Without a directory of its own, it has this process's, whatever that is called.
func TestCommandCleared(t *testing.T) {
	dir := t.TempDir()
	for _, test := range []struct {
		name, want string
		command    func(*exec.Cmd)
	}{
		{"environment", "as here " + dir, func(cmd *exec.Cmd) { cmd.Env, cmd.Dir = nil, dir }},
		{"directory", "as here as called here", func(cmd *exec.Cmd) { cmd.Dir = "" }},
	} {
		t.Run(test.name, func(t *testing.T) {
			upg, s := NewParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
				cmd.Args = proctest.Arguments("tell-environment")
				test.command(cmd)
			}}, "tell-environment")
			t.Setenv("LANG", "as here")
			t.Setenv("PWD", "as called here")
			Upgrade(t, upg)
			if got := s.Await("environment").Text; got != test.want {
				t.Errorf("the child has %q, want %q", got, test.want)
			}
		})
	}
}

func init() {
	proctest.Role("tell-environment", func() {
		proctest.Report("variables", inherit.Variables())
		MustBeReady(proctest.Must(tableflip.New(tableflip.Options{})))
		proctest.Report("environment", os.Getenv("LANG"), os.Getenv("PWD"))
	})
}

func TestCommandPanics(t *testing.T) {
	panicking := true
	upg, s := NewParent(t, tableflip.Options{Command: func(*exec.Cmd) {
		if panicking {
			panic("as told")
		}
	}}, "succeed")
	proctest.OK(t, upg.Ready())
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic was swallowed")
			}
		}()
		upg.Upgrade()
	}()
	panicking = false
	added := proctest.InBackground(func() error { return upg.AddFile("a", os.Stderr) })
	if err := proctest.Within(t, "AddFile", added); err != nil {
		t.Error(err)
	}
	proctest.OK(t, upg.Upgrade())
	s.Await("ready")
}

// The process that says it is ready need not be the one that was started.
func TestCommandWrapper(t *testing.T) {
	for _, test := range []struct {
		story  string
		script string
	}{
		{"waits for it", `"$0" & wait`},
		{"becomes it", `exec "$0"`},
		{"exits before it", `"$0" &`},
		{"is itself wrapped", `sh -c '"$0" & wait' "$0" & wait`},
	} {
		t.Run(test.story, func(t *testing.T) {
			var started *exec.Cmd
			upg, s := NewParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
				proctest.Shell(test.script)(cmd)
				started = cmd
			}}, "answer")
			ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
			Upgrade(t, upg)
			child := s.Await("ready")
			if (child.PID == started.Process.Pid) != (test.story == "becomes it") {
				t.Errorf("started %d, %d is ready", started.Process.Pid, child.PID)
			}
			if got := proctest.Answer(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.PID) {
				t.Errorf("the answer is %q, want %d", got, child.PID)
			}
			s.AwaitEnd()
		})
	}
}

// In cloudflare/tableflip v1.2.3 a closed standard stream makes every upgrade fail.
func TestCommandStdinClosed(t *testing.T) {
	stdin := os.Stdin
	defer func() { os.Stdin = stdin }()
	os.Stdin = proctest.ClosedFile()
	wantNullDevice(t, "stdin", nil)
}

func TestCommandStreams(t *testing.T) {
	for _, test := range []struct {
		story   string
		command func(*exec.Cmd)
	}{
		{"stdin closed", func(cmd *exec.Cmd) { cmd.Stdin = proctest.ClosedFile() }},
		{"stdin is nil", func(cmd *exec.Cmd) { cmd.Stdin = nil }},
		{"stdin is not a file", func(cmd *exec.Cmd) { cmd.Stdin = (*os.File)(nil) }},
		{"stderr closed", func(cmd *exec.Cmd) { cmd.Stderr = proctest.ClosedFile() }},
		{"stderr is not a file", func(cmd *exec.Cmd) { cmd.Stderr = (*os.File)(nil) }},
	} {
		t.Run(test.story, func(t *testing.T) {
			stream, _, _ := strings.Cut(test.story, " ")
			wantNullDevice(t, stream, test.command)
		})
	}
}

func wantNullDevice(t *testing.T, stream string, command func(*exec.Cmd)) {
	t.Helper()
	upg, s := NewParent(t, tableflip.Options{Command: command}, "standard-streams")
	Upgrade(t, upg)
	if m := s.Await(stream); m.Text != "true" {
		t.Errorf("%s is not %s in the child", stream, os.DevNull)
	}
}

func init() {
	proctest.Role("standard-streams", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		null := proctest.Must(os.Stat(os.DevNull))
		proctest.Report("stdin", os.SameFile(null, proctest.Must(os.Stdin.Stat())))
		proctest.Report("stderr", os.SameFile(null, proctest.Must(os.Stderr.Stat())))
	})
}

// In cloudflare/tableflip v1.2.3 relative paths are looked up in the directory of the
// moment.
func TestCommandChdir(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	proctest.OK(t, err)
	proctest.OK(t, os.Symlink(proctest.Must(os.Executable()), filepath.Join(dir, "service")))
	s := proctest.NewService(t)
	cmd := s.Command("wanderer")
	cmd.Dir = dir
	cmd.Path, cmd.Args = "./service", []string{"./service"}
	proctest.OK(t, cmd.Run())
	for generation := range 2 {
		m := s.Await("ready")
		if want := fmt.Sprintf("%d %s [./service]", m.PID, dir); m.Text != want {
			t.Errorf("generation %d: %s, want %s", generation+1, m.Text, want)
		}
	}
}

func init() {
	proctest.Role("wanderer", func() {
		start := proctest.Must(os.Getwd())
		elsewhere := proctest.Must(os.MkdirTemp("", "flip"))
		defer os.RemoveAll(elsewhere)
		proctest.Must(0, os.Chdir(elsewhere))
		upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: "pid"}))
		MustBeReady(upg)
		pid := proctest.Must(os.ReadFile(filepath.Join(start, "pid")))
		proctest.Report("ready", string(pid), start, os.Args)
		if !upg.HasParent() {
			proctest.Must(0, upg.Upgrade())
		}
	})
}
