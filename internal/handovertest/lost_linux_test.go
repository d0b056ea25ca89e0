package handovertest

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/proctest"
)

// Some wrappers lose descriptors or variables. Then the service must not silently become
// a first generation beside the process that waits for it.

func init() {
	// lossy lives on if New returns no error.
	proctest.Role("lossy", func() {
		upg, err := tableflip.New(tableflip.Options{PIDFile: os.Args[2]})
		if err != nil {
			proctest.Report("new", err)
			_, again := tableflip.New(tableflip.Options{})
			proctest.Report("new-again", again)
			os.Exit(5)
		}
		proctest.Report("new", "no error, and a parent:", upg.HasParent())
		proctest.UntilKilled()
	})
}

func TestLostDescriptors(t *testing.T) {
	for _, test := range []struct{ name, script, want string }{
		{"both pipes", `exec "$0" "$@" 3>&- 4>&-`, "did not arrive"},
		{"the ready pipe", `exec "$0" "$@" 3>&-`, "did not arrive"},
		{"the verdict pipe", `exec "$0" "$@" 4<&-`, "did not arrive"},
		{"pipes are others", `: | exec "$0" "$@" 3<&0 4<&0`, "did not arrive"},
		{"all, beside another child", `"$0" "$@" 3>&- 4>&- 5>&- & wait; exit 5`, "did not arrive"},
		{"pipes replaced by files", `exec "$0" "$@" 3>/dev/null 4</dev/null`, "did not arrive"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pid")
			upg, s := NewParent(t, tableflip.Options{
				PIDFile:      path,
				ListenConfig: reusePort,
				Command: func(cmd *exec.Cmd) {
					cmd.Args = proctest.Arguments("lossy", path)
					proctest.Shell(test.script)(cmd)
				},
			}, "lossy")
			proctest.OK(t, proctest.ErrorOf(upg.Listen("tcp", "localhost:0")))
			proctest.OK(t, upg.Ready())
			err := upg.Upgrade()
			if err == nil || !strings.Contains(err.Error(), "did not call New, or not with what this process passed on") {
				t.Errorf("Upgrade: %v", err)
			}
			for _, call := range []string{"new", "new-again"} {
				m := s.Await(call)
				for _, want := range []string{"tableflip: process " + strconv.Itoa(os.Getpid()) + " waits for this one", test.want, "Options.Command"} {
					if !strings.Contains(m.Text, want) {
						t.Errorf("%s: %s, which does not say %q", call, m.Text, want)
					}
				}
			}
			if content, err := os.ReadFile(path); string(content) != strconv.Itoa(os.Getpid()) {
				t.Errorf("the PID file holds %q, %v", content, err)
			}
		})
	}
}

// Without the variables, the service cannot know. The parent can.
func TestLostTable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	upg, s := NewParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
		cmd.Args = proctest.Arguments("lossy", path)
		proctest.Shell(`exec env -i "$0" "$@"`)(cmd)
	}}, "lossy")
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	result := proctest.InBackground(func() error { return upg.UpgradeContext(ctx) })
	m := s.Await("new")
	if m.Text != "no error, and a parent: false" {
		t.Errorf("New: %s", m.Text)
	}
	cancel(os.ErrDeadlineExceeded)
	err := proctest.Within(t, "Upgrade", result)
	proctest.WantError(t, "Upgrade", err, os.ErrDeadlineExceeded)
	if err != nil && (!strings.Contains(err.Error(), "env -i") || !strings.Contains(err.Error(), strconv.Itoa(m.PID))) {
		t.Errorf("Upgrade: %v", err)
	}
	if !proctest.IsReaped(m.PID) {
		t.Error("two services are in charge")
	}
}

// The process that has sent the table waits until the deadline of its caller.
func TestLostDescriptorsDeadline(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{
		UpgradeTimeout: 1,
		Command: func(cmd *exec.Cmd) {
			cmd.Args = proctest.Arguments("lossy", "")
			proctest.Shell(`exec "$0" "$@" 3>&- 4>&-`)(cmd)
		},
	}, "lossy")
	proctest.OK(t, upg.Ready())
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	if err := upg.UpgradeContext(ctx); err == nil {
		t.Error("the upgrade succeeded")
	}
	if m := s.Await("new"); !strings.Contains(m.Text, "waits for this one") {
		t.Errorf("New: %s", m.Text)
	}
}

// Without the pipes, a table is this process's own only if its sender may wait for it.
func TestLostOrLeaked(t *testing.T) {
	stranger := exec.Command("sh", "-c", "sleep 1000 & echo $!; wait")
	pipe, err := stranger.StdoutPipe()
	proctest.OK(t, err)
	proctest.OK(t, stranger.Start())
	line, err := bufio.NewReader(pipe).ReadString('\n')
	proctest.OK(t, err)
	nephew, err := strconv.Atoi(strings.TrimSpace(line))
	proctest.OK(t, err)
	t.Cleanup(func() {
		syscall.Kill(nephew, syscall.SIGKILL)
		stranger.Wait()
	})
	for _, test := range []struct {
		sender    string
		pid       int
		namespace string
		until     time.Duration
		lost      bool
	}{
		{"ancestor", os.Getpid(), process.PIDNamespace(), time.Hour, true},
		{"sibling", stranger.Process.Pid, process.PIDNamespace(), time.Hour, true},
		{"stranger", nephew, process.PIDNamespace(), time.Hour, false},
		{"ancestor that waits no more", os.Getpid(), process.PIDNamespace(), -time.Hour, false},
		{"another PID namespace", os.Getpid(), "other", time.Hour, false},
	} {
		t.Run(test.sender, func(t *testing.T) {
			s := proctest.NewService(t)
			table := nametable.Table{PID: test.pid, PIDNamespace: test.namespace, Until: time.Now().Add(test.until)}
			table.Ready, table.Verdict = nametable.PipeID{Inode: 1}, nametable.PipeID{Inode: 2}
			s.Start(s.Command("new-once", table.Encode()...))
			if m := s.Await("new"); strings.Contains(m.Text, "did not arrive") != test.lost || !test.lost && m.Text != "<nil>" {
				t.Errorf("New: %s", m.Text)
			}
		})
	}
}

func init() {
	proctest.Role("new-once", func() {
		proctest.Report("new", proctest.ErrorOf(tableflip.New(tableflip.Options{})))
	})
}
