package handovertest

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// Both sides of cloudflare/tableflip's handover, from what package upstream documents. The
// tests in benchmarks/compat have the module itself in their place.

const upstreamReady = "*"

// A foreigner is a child of a parent with the other library, which is the test.
type foreigner struct {
	*proctest.Service
	cmd     *exec.Cmd
	ready   *os.File // read end
	names   *os.File // write end
	pidFile string
}

// startUnderUpstream starts a child, which is told the names of files.
func startUnderUpstream(t *testing.T, role string, names any, files ...*os.File) foreigner {
	t.Helper()
	f := foreigner{Service: proctest.NewService(t), pidFile: filepath.Join(t.TempDir(), "pid")}
	readyRead, readyWrite, err := os.Pipe()
	proctest.OK(t, err)
	namesRead, namesWrite, err := os.Pipe()
	proctest.OK(t, err)
	f.ready, f.names = readyRead, namesWrite
	t.Cleanup(func() {
		readyRead.Close()
		namesWrite.Close()
	})
	f.cmd = f.Command(role, inherit.Upstream+"=yes", proctest.WithArg(f.pidFile))
	f.cmd.ExtraFiles = append([]*os.File{readyWrite, namesRead}, files...)
	f.Start(f.cmd)
	readyWrite.Close()
	namesRead.Close()
	switch names := names.(type) {
	case [][]string:
		proctest.OK(t, gob.NewEncoder(namesWrite).Encode(names))
	case string:
		_, err := io.WriteString(namesWrite, names)
		proctest.OK(t, err)
		namesWrite.Close()
	}
	return f
}

func TestUpstreamParent(t *testing.T) {
	listener, addr := listenerFile(t)
	file := proctest.Opened[*os.File](t)(os.Open(os.DevNull))
	f := startUnderUpstream(t, "under-upstream", [][]string{{"listener", "tcp", "127.0.0.1:0"}, {"fd", "a;b", ""}}, listener, file)
	if m := f.Await("found"); m.Text != "" {
		t.Error("New leaves behind:", m.Text)
	}
	if m, want := f.Await("generations"), fmt.Sprintf("[%d:1:in charge %d:2:starting]", os.Getpid(), f.cmd.Process.Pid); m.Text != want {
		t.Errorf("the generations are %s, want %s", m.Text, want)
	}

	said := make([]byte, 10)
	n, err := f.ready.Read(said)
	if string(said[:n]) != upstreamReady || err != nil {
		t.Fatalf("the child said %q, %v", said[:n], err)
	}
	// The parent may exit at once, and nobody then looks at an older PID.
	content, err := os.ReadFile(f.pidFile)
	proctest.OK(t, err)
	if string(content) != strconv.Itoa(f.cmd.Process.Pid) {
		t.Errorf("the PID file has %q, and the child is %d", content, f.cmd.Process.Pid)
	}
	f.Await("ready")
	if got := proctest.Answer(t, "tcp", addr); got != strconv.Itoa(f.cmd.Process.Pid) {
		t.Errorf("the answer is %q", got)
	}
	if m := f.Await("upgraded"); m.Text != tableflip.ErrParentRunning.Error() {
		t.Errorf("while the parent drains, Upgrade returned %q", m.Text)
	}
	f.names.Close()
	f.Await("alone")
	if n, err := f.ready.Read(said); n != 0 || err != io.EOF {
		t.Errorf("the child also said %q, %v", said[:n], err)
	}
	f.AwaitEnd()
}

// The subprocesses of a service with the other library have its variable, and descriptors 3
// and 4 may be anything.
func TestUpstreamStrangers(t *testing.T) {
	bin := proctest.SocketDir(t)
	proctest.OK(t, os.Chmod(bin, 0o755))
	copyBinary(t, filepath.Join(bin, "service"))
	other := func(cmd *exec.Cmd) { // may not look at its parent's descriptors
		if os.Getuid() != 0 {
			t.Skip("only root can start a process of another user")
		}
		cmd.Path = filepath.Join(bin, "service")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	writable := proctest.Opened[*os.File](t)(os.OpenFile(os.DevNull, os.O_WRONLY, 0))
	readable := proctest.Opened[*os.File](t)(os.Open(os.DevNull))
	tests := []struct {
		name      string
		silent    bool // the parent names no descriptors
		prepare   func(*exec.Cmd)
		hasParent bool
		inherits  bool // what it starts has descriptors 3 and 4, too
	}{
		{name: "a child", prepare: func(*exec.Cmd) {}, hasParent: true},
		{name: "a child of another user", prepare: other, hasParent: true},
		{name: "a silent parent of another user", silent: true, prepare: other},
		{name: "a subprocess", prepare: proctest.Shell(`"$0"; exit $?`)},
		{name: "no variable", inherits: true, prepare: func(cmd *exec.Cmd) {
			cmd.Env = slices.DeleteFunc(cmd.Env, func(v string) bool { return strings.HasPrefix(v, inherit.Upstream) })
		}},
		{name: "files", inherits: true, prepare: func(cmd *exec.Cmd) {
			cmd.ExtraFiles = []*os.File{writable, readable}
		}},
		{name: "a file and a pipe", inherits: true, prepare: func(cmd *exec.Cmd) { cmd.ExtraFiles[0] = writable }},
		{name: "a pipe and a file", inherits: true, prepare: func(cmd *exec.Cmd) { cmd.ExtraFiles[1] = readable }},
		{name: "two read ends", prepare: func(cmd *exec.Cmd) { cmd.ExtraFiles[0] = cmd.ExtraFiles[2] }},
		{name: "two write ends", prepare: func(cmd *exec.Cmd) { cmd.ExtraFiles[1] = cmd.ExtraFiles[3] }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := proctest.NewService(t)
			cmd := s.Command("under-upstream-or-not", inherit.Upstream+"=yes")
			readyRead, readyWrite := pipe(t)
			namesRead, namesWrite := pipe(t)
			cmd.ExtraFiles = []*os.File{readyWrite, namesRead, readyRead, namesWrite}
			test.prepare(cmd)
			cmd.ExtraFiles = cmd.ExtraFiles[:2]
			if !test.silent {
				proctest.OK(t, gob.NewEncoder(namesWrite).Encode([][]string{}))
			}
			s.Start(cmd)
			if got, want := s.Await("starts").Text, fmt.Sprint(!test.inherits, !test.inherits); got != want {
				t.Errorf("close-on-exec: %s, want %s", got, want)
			}
			if got, want := s.Await("new").Text, fmt.Sprint(test.hasParent, nil); got != want {
				t.Errorf("New: %s, want %s", got, want)
			}
		})
	}
}

func pipe(t *testing.T) (read, write *os.File) {
	t.Helper()
	read, write, err := os.Pipe()
	proctest.OK(t, err)
	t.Cleanup(func() {
		read.Close()
		write.Close()
	})
	return read, write
}

// A child waits for the names.
func TestUpstreamNamesLate(t *testing.T) {
	f := startUnderUpstream(t, "under-upstream-or-not", nil)
	f.Await("starts")
	proctest.OK(t, gob.NewEncoder(f.names).Encode([][]string{}))
	if got, want := f.Await("new").Text, fmt.Sprint(true, nil); got != want {
		t.Errorf("New: %s, want %s", got, want)
	}
}

func init() {
	proctest.Role("under-upstream-or-not", func() {
		proctest.Report("starts", fmt.Sprint(proctest.Must(descriptor.IsCloseOnExec(3)), proctest.Must(descriptor.IsCloseOnExec(4))))
		upg, err := tableflip.New(tableflip.Options{})
		proctest.Report("new", fmt.Sprint(err == nil && upg.HasParent(), err))
	})
}

// The parent tells the service manager nothing, and may exit once the child is ready.
func TestUpstreamManager(t *testing.T) {
	m := startedByManager(t)
	listener, _ := listenerFile(t)
	f := startUnderUpstream(t, "under-upstream-later", [][]string{{"listener", "tcp", "127.0.0.1:0"}}, listener)
	child := f.Await("new")
	proctest.Terminate(t, child.PID)
	said := make([]byte, 10)
	n, err := f.ready.Read(said)
	if string(said[:n]) != upstreamReady || err != nil {
		t.Fatalf("the child said %q, %v", said[:n], err)
	}
	m.sendLast()
	m.want(child.PID, mainPID(child.PID))
	m.want(os.Getpid(), last)
}

// A parent that dies in the last moment leaves the child in charge.
func TestUpstreamParentDies(t *testing.T) {
	t.Run("before Ready", func(t *testing.T) {
		listener, addr := listenerFile(t)
		f := startUnderUpstream(t, "under-upstream-later", [][]string{{"listener", "tcp", "127.0.0.1:0"}}, listener)
		child := f.Await("new")
		f.ready.Close()
		f.names.Close()
		proctest.Terminate(t, child.PID)
		f.Await("ready")
		proctest.Answer(t, "tcp", addr)
		f.Await("alone")
	})
	t.Run("while it is told", func(t *testing.T) {
		listener, addr := listenerFile(t)
		f := startUnderUpstream(t, "under-upstream-later", [][]string{{"listener", "tcp", "127.0.0.1:0"}}, listener)
		child := f.Await("new")
		f.ready.Close()
		proctest.Terminate(t, child.PID)
		proctest.AwaitThat(t, "the PID file", func() bool {
			content, _ := os.ReadFile(f.pidFile)
			return string(content) == strconv.Itoa(child.PID)
		})
		f.names.Close()
		f.Await("ready")
		proctest.Answer(t, "tcp", addr)
	})
}

// A process that the parent has forked may have its end of the pipe open: here the test.
func TestUpstreamParentPipeHeld(t *testing.T) {
	listener, addr := listenerFile(t)
	namesRead, namesWrite, err := os.Pipe()
	proctest.OK(t, err)
	t.Cleanup(func() {
		namesRead.Close()
		namesWrite.Close()
	})
	s := proctest.NewService(t)
	cmd := s.Command("upstream-parent", proctest.WithArg(filepath.Join(t.TempDir(), "pid")))
	cmd.ExtraFiles = []*os.File{namesRead, namesWrite, listener}
	s.Start(cmd)
	child := s.Await("new")
	proctest.Terminate(t, child.PID)
	s.Await("ready")
	proctest.Answer(t, "tcp", addr)
	if m := s.Await("upgraded"); m.Text != tableflip.ErrParentRunning.Error() {
		t.Errorf("while the parent drains, Upgrade returned %q", m.Text)
	}
	proctest.Kill(t, cmd.Process.Pid, syscall.SIGKILL)
	s.Await("alone")
}

func init() {
	// upstream-parent finds the pipe of the names, and a listener, as descriptors 3 to 5.
	proctest.Role("upstream-parent", func() {
		readyRead, readyWrite, err := os.Pipe()
		proctest.Must(0, err)
		names := [][]string{{"listener", "tcp", "127.0.0.1:0"}}
		proctest.Must(0, gob.NewEncoder(os.NewFile(4, "names")).Encode(names))
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), proctest.Environment("under-upstream-later"), inherit.Upstream+"=yes")
		child.Stdout, child.Stderr = os.Stdout, os.Stderr
		child.ExtraFiles = []*os.File{readyWrite, os.NewFile(3, "names"), os.NewFile(5, "listener")}
		proctest.Must(0, child.Start())
		proctest.UntilKilled()
		readyRead.Close() // not before, by the garbage collector
	})
}

// Whoever can't take charge tells neither the parent nor the service manager that it has.
func TestUpstreamParentCommitFails(t *testing.T) {
	m := startedByManager(t)
	f := startUnderUpstream(t, "under-upstream-fails", [][]string{})
	if got := f.Await("refused").Text; !strings.Contains(got, "can't replace the PID file") {
		t.Errorf("Ready returned %s", got)
	}
	m.wantNoMore()
	if said, err := io.ReadAll(f.ready); len(said) > 0 || err != nil {
		t.Errorf("the child said %q, %v", said, err)
	}
	f.AwaitEnd()
}

// A parent with the other library leaks the table that it was started with by one of ours,
// whose process may not have ended yet.
func TestUpstreamParentLeaks(t *testing.T) {
	leaked := nametable.Table{PID: os.Getpid(), PIDNamespace: process.PIDNamespace(), Until: time.Now().Add(time.Hour)}
	for _, variable := range leaked.Encode() {
		name, value, _ := strings.Cut(variable, "=")
		t.Setenv(name, value)
	}
	listener, _ := listenerFile(t)
	f := startUnderUpstream(t, "under-upstream-later", [][]string{{"listener", "tcp", "127.0.0.1:0"}}, listener)
	proctest.Terminate(t, f.Await("new").PID)
	f.Await("ready")
}

// What a parent passes on, which tells only names, also has the address that it is bound to,
// and its file is the child's to unlink.
func TestUpstreamParentDescribed(t *testing.T) {
	listener, _ := listenerFile(t)
	path := filepath.Join(proctest.SocketDir(t), "socket")
	unixListener := proctest.Opened[net.Listener](t)(net.Listen("unix", path)).(*net.UnixListener)
	unixListener.SetUnlinkOnClose(false)
	unixFile := proctest.Opened[*os.File](t)(unixListener.File())
	names := [][]string{{"listener", "tcp", "127.0.0.1:0"}, {"listener", "unix", path}}
	f := startUnderUpstream(t, "under-upstream-described", names, listener, unixFile)
	if m := f.Await("removed"); m.Text != "<nil>" {
		t.Errorf("RemoveListener by the address of the socket: %s", m.Text)
	}
	if m := f.Await("exists"); m.Text != "true false" {
		t.Errorf("before and after Stop, the file of the Unix socket exists: %s", m.Text)
	}
}

// A parent may name what it has not passed on: so much that it is not all taken by what the
// runtime opens.
func TestUpstreamParentFewer(t *testing.T) {
	f := startUnderUpstream(t, "under-upstream-garbled", slices.Repeat([][]string{{"fd", "a", ""}}, 30))
	for range 2 {
		if m := f.Await("new"); !strings.Contains(m.Text, "inherit descriptor") {
			t.Errorf("New: %s", m.Text)
		}
	}
}

// With Options.Compat, a child that needs no names does not keep their pipe.
func TestUpstreamNamesClosed(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{Compat: true}, "compare-names")
	Upgrade(t, upg)
	if m := s.Await("same"); m.Text != "false" {
		t.Error("the pipe of the names is still open")
	}
}

func init() {
	proctest.Role("under-upstream-described", func() {
		addrOf := func(fd int) string {
			file := os.NewFile(uintptr(proctest.Must(syscall.Dup(fd))), "listener")
			return proctest.Must(net.FileListener(file)).Addr().String()
		}
		addr, path := addrOf(5), addrOf(6)
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Must(upg.Listener("tcp", "127.0.0.1:0"))
		proctest.Must(upg.Listener("unix", path))
		MustBeReady(upg)
		proctest.Report("removed", upg.RemoveListener("tcp", addr))
		before := proctest.Exists(path)
		upg.Stop()
		proctest.Report("exists", before, proctest.Exists(path))
	})
	proctest.Role("compare-names", func() {
		var names, now syscall.Stat_t
		proctest.Must(0, syscall.Fstat(4, &names))
		MustBeReady(proctest.Must(tableflip.New(tableflip.Options{})))
		err := syscall.Fstat(4, &now)
		proctest.Report("same", err == nil && now.Ino == names.Ino)
	})
}

func TestUpstreamParentGarbled(t *testing.T) {
	for _, names := range []string{"", "\x05gar", "garbled"} {
		t.Run(fmt.Sprintf("%q", names), func(t *testing.T) {
			f := startUnderUpstream(t, "under-upstream-garbled", names)
			first, again := f.Await("new").Text, f.Await("new").Text
			if !strings.Contains(first, "can't read what the parent, which uses cloudflare/tableflip, passes on") || again != first {
				t.Errorf("New: %s\nand again: %s", first, again)
			}
			f.AwaitEnd()
		})
	}
}

func init() {
	under := func(upg *tableflip.Upgrader) {
		ln := proctest.Must(upg.Listener("tcp", "127.0.0.1:0"))
		MustBeReady(upg)
		proctest.Report("ready")
		conn := proctest.Must(ln.Accept())
		proctest.Must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
		conn.Close()
		proctest.Report("upgraded", upg.Upgrade())
		proctest.Must(0, upg.WaitForParent(context.Background()))
		proctest.Report("alone")
	}
	open := func() *tableflip.Upgrader {
		return proctest.Must(tableflip.New(tableflip.Options{PIDFile: proctest.Arg(), Command: proctest.Unstartable}))
	}
	proctest.Role("under-upstream", func() {
		var found []string
		for fd := uintptr(3); fd < 7; fd++ {
			if !proctest.Must(descriptor.IsCloseOnExec(fd)) {
				found = append(found, fmt.Sprintf("descriptor %d, open on exec", fd))
			}
		}
		upg := open()
		if value, ok := os.LookupEnv(inherit.Upstream); ok {
			found = append(found, "the variable, with "+value)
		}
		proctest.Report("found", strings.Join(found, ", "))
		proctest.Must(upg.File("a;b")).Close()
		var generations []string
		for _, g := range upg.Generations() {
			generations = append(generations, fmt.Sprintf("%d:%d:%s", g.PID, g.Number, g.State))
		}
		proctest.Report("generations", generations)
		under(upg)
	})
	proctest.Role("under-upstream-later", func() {
		terminated := proctest.Terminated()
		upg := open()
		proctest.Report("new")
		<-terminated
		under(upg)
	})
	proctest.Role("under-upstream-fails", func() {
		upg := open()
		proctest.When(step.VerdictReceived, func() { proctest.Must(0, os.Remove(proctest.Arg()+".tmp")) })
		proctest.Report("refused", upg.Ready())
	})
	proctest.Role("under-upstream-garbled", func() {
		for range 2 {
			proctest.Report("new", proctest.ErrorOf(tableflip.New(tableflip.Options{})))
		}
	})
}

func TestUpstreamChild(t *testing.T) {
	for _, status := range []string{"0", "7"} {
		t.Run("exits with "+status, func(t *testing.T) {
			upg, s := NewParent(t, tableflip.Options{Compat: true}, "upstream-child", proctest.WithArg(status))
			ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "127.0.0.1:0"))
			proctest.OK(t, upg.AddFile("a;b", os.Stderr))
			proctest.OK(t, upg.Ready())
			events, cancel := event.Subscribe()
			defer cancel()
			proctest.OK(t, upg.Upgrade())
			if all := strings.Join(shown(events), ", "); !strings.Contains(all, "here pid") {
				t.Errorf("the events are %s", all)
			}
			if !upg.Replaced() {
				t.Error("Replaced returns false")
			}
			child := s.Await("named")
			if want := "[[listener tcp 127.0.0.1:0] [fd a;b ]]"; child.Text != want {
				t.Errorf("the child was told %s, want %s", child.Text, want)
			}
			if got := proctest.Answer(t, "tcp", ln.Addr().String()); got != strconv.Itoa(child.PID) {
				t.Errorf("the answer is %q, want %d", got, child.PID)
			}
			proctest.WantError(t, "Upgrade", upg.Upgrade(), tableflip.ErrUpgraded)
			if g := upg.Generations(); len(g) != 2 || g[1].PID != child.PID {
				t.Errorf("the generations are %v", g)
			}
			if proctest.IsClosed(upg.Hurry()) {
				t.Error("this process is to hurry because the child has closed its pipe")
			}

			proctest.Terminate(t, child.PID)
			if m := s.Await("heard"); m.Text != "" {
				t.Errorf("behind the names, the child heard %q", m.Text)
			}
			proctest.AwaitThat(t, "the child's end", func() bool { return len(upg.Generations()) == 1 })
			if got, want := proctest.IsClosed(upg.Hurry()), status != "0"; got != want {
				t.Errorf("this process is to hurry: %t, want %t", got, want)
			}
		})
	}
}

// A child that dies right after it has said that it is ready is not put in charge.
func TestUpstreamChildDies(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	upg, s := NewParent(t, tableflip.Options{Compat: true, PIDFile: pidFile}, "upstream-child", proctest.WithArg("0"))
	proctest.OK(t, upg.Ready())
	rehearse := func() error { return upg.Rehearse(t.Context()) }
	for i, upgrade := range []func() error{upg.Upgrade, rehearse, rehearse} {
		restore := proctest.During(t, step.ReadyReceived, func() {
			child := s.Await("named").PID
			proctest.OK(t, os.WriteFile(pidFile, []byte(strconv.Itoa(child)), 0o600)) // as the other library does
			proctest.Kill(t, child, syscall.SIGKILL)
			proctest.AwaitDeath(t, child)
			if i == 2 { // as in a program that waits for all of its children
				proctest.Must(syscall.Wait4(child, nil, 0, nil))
			}
		})
		err := upgrade()
		restore()
		if err == nil || !strings.Contains(err.Error(), "was ready, and has died") {
			t.Fatal("the error is", err)
		}
		content, err := os.ReadFile(pidFile)
		proctest.OK(t, err)
		if want := strconv.Itoa(os.Getpid()); string(content) != want {
			t.Errorf("the PID file has %q, want %s", content, want)
		}
	}
	proctest.OK(t, upg.Upgrade())
	s.Await("named")
}

// A rehearsal ends a child with the other library, which takes itself to be in charge.
func TestUpstreamRehearse(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{Compat: true}, "upstream-child", proctest.WithArg("0"))
	proctest.OK(t, upg.Ready())
	proctest.OK(t, twice(t, func() error { return upg.Rehearse(t.Context()) }))
	s.Await("named")
	child := s.Await("named")
	if !proctest.IsReaped(child.PID) {
		t.Errorf("the child, %d, is still there", child.PID)
	}
	if upg.Replaced() {
		t.Error("Replaced returns true")
	}
	// At once, because what it accepts is lost. A busy machine may need some attempts.
	const timeToLeave = time.Second
	for attempt := 1; ; attempt++ {
		began := time.Now()
		proctest.OK(t, upg.Rehearse(t.Context()))
		took := time.Since(began)
		s.Await("named")
		if took < timeToLeave {
			break
		}
		if attempt == 5 {
			t.Fatalf("the child, which serves, was given %v to leave", took)
		}
	}
	Upgrade(t, upg)
	s.Await("named")
}

// A child that can't be killed serves until it ends, and has closed its pipe long before.
func TestUpstreamUnkillable(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can start a process of another user")
	}
	bin := proctest.SocketDir(t)
	proctest.OK(t, os.Chmod(bin, 0o755))
	copyBinary(t, filepath.Join(bin, "service"))
	dropCapKill(t)
	s, _ := proctest.Start(t, "upstream-unkillable", proctest.WithArg(filepath.Join(bin, "service")))
	child := s.Await("named")
	if m := s.Await("rehearsed"); !strings.Contains(m.Text, "not permitted") {
		t.Errorf("Rehearse returned %q", m.Text)
	}
	if m := s.Await("events"); !strings.Contains(m.Text, "failed") {
		t.Errorf("the events are %s", m.Text)
	}
	if m := s.Await("refused"); m.Text != tableflip.ErrUpgradeInProgress.Error() {
		t.Fatalf("while the child serves, Rehearse returned %q", m.Text)
	}
	proctest.Kill(t, child.PID, syscall.SIGKILL)
	if m := s.Await("again"); m.Text != "<nil>" {
		t.Errorf("once the child had ended, Rehearse returned %q", m.Text)
	}
}

func init() {
	proctest.Role("upstream-unkillable", func() {
		step.KillTimeout = time.Second // which passes
		user := &syscall.Credential{Uid: 65534, Gid: 65534}
		upg := proctest.Must(tableflip.New(tableflip.Options{Compat: true, Command: func(cmd *exec.Cmd) {
			cmd.Path = proctest.Arg()
			cmd.Env = append(cmd.Env, proctest.Environment("upstream-child"), proctest.WithArg("0"))
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: user}
		}}))
		MustBeReady(upg)
		rehearse := func() error { return upg.Rehearse(context.Background()) }
		events, cancel := event.Subscribe()
		proctest.Report("rehearsed", rehearse())
		proctest.Report("events", shown(events))
		cancel()
		user = nil
		// Nothing tells when it could be wrong.
		err := tableflip.ErrUpgradeInProgress
		for late := time.Now().Add(time.Second / 10); err == tableflip.ErrUpgradeInProgress && time.Now().Before(late); {
			err = rehearse()
		}
		proctest.Report("refused", err)
		for err == tableflip.ErrUpgradeInProgress {
			err = rehearse()
		}
		proctest.Report("again", err)
	})
}

// The names of many descriptors do not fit into a pipe, and a child of ours never reads
// them.
func TestUpstreamManyNames(t *testing.T) {
	proctest.WithoutGC(t)
	role := "succeed"
	upg, s := NewParent(t, tableflip.Options{Compat: true, Command: func(cmd *exec.Cmd) {
		if role == "hang" {
			cmd.Env = append(cmd.Env, proctest.Environment(role))
		}
	}}, role)
	for i := range 100 {
		proctest.OK(t, upg.AddFile(strings.Repeat("name", 250)+strconv.Itoa(i), os.Stderr))
	}
	proctest.OK(t, upg.Ready())
	before := proctest.OpenDescriptors()
	role = "hang"
	ctx, cancel := context.WithCancel(t.Context())
	restore := proctest.When(step.ChildStarted, cancel)
	proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.Canceled)
	restore()
	if after := proctest.OpenDescriptors(); after != before {
		t.Errorf("after a failed upgrade %d descriptors are open, %d before", after, before)
	}
	role = "succeed"
	proctest.OK(t, upg.Upgrade())
	s.Await("ready")
}

// With Options.Compat, too, the parent learns how a child has ended that said nothing.
func TestUpstreamFails(t *testing.T) {
	upg, _ := NewParent(t, tableflip.Options{Compat: true}, "fail")
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("Upgrade: %v", err)
	}
}

// With Options.Compat, too, a wrapper may start the service.
func TestUpstreamWrapper(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{Compat: true, Command: proctest.Shell(`"$0" & wait`)}, "succeed")
	Upgrade(t, upg)
	s.Await("ready")
}

// With Options.Compat no token can tell pipes apart.
func TestUpstreamAnonymous(t *testing.T) {
	anonymousPipes(t)
	upg, s := NewParent(t, tableflip.Options{Compat: true}, "anonymous-compat")
	Upgrade(t, upg)
	if m := s.Await("anonymous-compat"); m.Text != "true" {
		t.Errorf("HasParent returned %s", m.Text)
	}
	if m := s.Await("anonymous-compat"); m.Text != "false" {
		t.Errorf("in a process that the table leaked to, with other pipes, HasParent returned %s", m.Text)
	}
}

func init() {
	proctest.Role("upstream-child", func() {
		terminated := proctest.Terminated()
		if value := startingEnvironment()[inherit.Upstream]; value != "yes" {
			panic("the variable is " + value)
		}
		var names [][]string
		proctest.Must(0, gob.NewDecoder(os.NewFile(4, "names")).Decode(&names))
		proctest.Report("named", names)
		ready := os.NewFile(3, "ready")
		proctest.Must(io.WriteString(ready, upstreamReady))
		ready.Close()
		if len(names) > 0 {
			conn := proctest.Must(proctest.Must(net.FileListener(os.NewFile(5, "listener"))).Accept())
			proctest.Must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
			conn.Close()
		}
		<-terminated
		syscall.SetNonblock(4, true)
		heard := make([]byte, 100)
		n, err := syscall.Read(4, heard)
		if !errors.Is(err, syscall.EAGAIN) {
			panic(fmt.Sprintf("read %d, %v", n, err))
		}
		proctest.Report("heard", string(heard[:max(n, 0)]))
		os.Exit(proctest.Must(strconv.Atoi(proctest.Arg())))
	})
	proctest.Role("anonymous-compat", func() {
		descriptor.AnonymousPipes = true
		variables := inherit.Variables()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		proctest.Report("anonymous-compat", upg.HasParent())
		read, write, err := os.Pipe()
		proctest.Must(0, err)
		leaked := exec.Command(os.Args[0])
		leaked.Env = append(os.Environ(), proctest.Environment("anonymous-compat-leaked"))
		for name, value := range variables {
			leaked.Env = append(leaked.Env, name+"="+late.ReplaceAllString(value, "until=1"))
		}
		leaked.Stdout, leaked.Stderr = os.Stdout, os.Stderr
		leaked.ExtraFiles = []*os.File{write, read}
		leaked.ExtraFiles = append(leaked.ExtraFiles, slices.Repeat([]*os.File{read}, 2)...)
		proctest.Must(0, leaked.Run())
	})
	proctest.Role("anonymous-compat-leaked", func() {
		descriptor.AnonymousPipes = true
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Report("anonymous-compat", upg.HasParent())
	})
}
