//go:build unix

package handovertest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// These tests are about new processes that cannot be started.

// writeProgram writes what may be tried to start, and returns its path.
func writeProgram(t *testing.T, content []byte, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	proctest.OK(t, os.WriteFile(path, content, mode))
	return path
}

// foreignELF is the header of a program for a machine that there is not.
func foreignELF() []byte {
	header := make([]byte, 64)
	copy(header, "\x7fELF\x02\x01\x01")                // 64 bit, little-endian, version 1
	binary.LittleEndian.PutUint16(header[16:], 2)      // executable
	binary.LittleEndian.PutUint16(header[18:], 0xfeed) // machine
	binary.LittleEndian.PutUint32(header[20:], 1)      // version
	binary.LittleEndian.PutUint16(header[52:], 64)     // size of the header
	return header
}

func TestStartFails(t *testing.T) {
	script := []byte("#!/bin/sh\nexit 7\n")
	tests := []struct {
		name string
		// prepare returns the path to start, and how else to start it.
		prepare func(t *testing.T, upg *tableflip.Upgrader) (path string, customize func(*exec.Cmd))
		cause   error
		advice  string
	}{
		{
			name: "missing binary",
			prepare: func(t *testing.T, _ *tableflip.Upgrader) (string, func(*exec.Cmd)) {
				return filepath.Join(t.TempDir(), "program"), nil
			},
			cause:  os.ErrNotExist,
			advice: "put the new binary",
		},
		{
			name: "not executable",
			prepare: func(t *testing.T, _ *tableflip.Upgrader) (string, func(*exec.Cmd)) {
				return writeProgram(t, script, 0o644), nil
			},
			cause:  os.ErrPermission,
			advice: "executable for this user",
		},
		{
			name: "binary being written",
			prepare: func(t *testing.T, _ *tableflip.Upgrader) (string, func(*exec.Cmd)) {
				path := writeProgram(t, script, 0o755)
				file, err := os.OpenFile(path, os.O_WRONLY, 0)
				proctest.OK(t, err)
				t.Cleanup(func() { file.Close() })
				if err := exec.Command(path).Run(); !errors.Is(err, syscall.ETXTBSY) {
					t.Skipf("this kernel executes files that are being written, as Linux 6.11 and 6.12 do: %v", err)
				}
				return path, nil
			},
			cause:  syscall.ETXTBSY,
			advice: "rename it into place",
		},
		{
			name: "wrong architecture",
			prepare: func(t *testing.T, _ *tableflip.Upgrader) (string, func(*exec.Cmd)) {
				return writeProgram(t, foreignELF(), 0o755), nil
			},
			cause:  syscall.ENOEXEC,
			advice: runtime.GOOS + "/" + runtime.GOARCH,
		},
		{
			name: "garbage",
			prepare: func(t *testing.T, _ *tableflip.Upgrader) (string, func(*exec.Cmd)) {
				return writeProgram(t, []byte("garbage\n"), 0o755), nil
			},
			cause:  syscall.ENOEXEC,
			advice: runtime.GOOS + "/" + runtime.GOARCH,
		},
		{
			name: "missing interpreter",
			prepare: func(t *testing.T, _ *tableflip.Upgrader) (string, func(*exec.Cmd)) {
				return writeProgram(t, []byte("#!/lacking\n"), 0o755), nil
			},
			cause:  os.ErrNotExist,
			advice: "install the interpreter",
		},
		{
			name: "missing directory",
			prepare: func(t *testing.T, _ *tableflip.Upgrader) (string, func(*exec.Cmd)) {
				path := writeProgram(t, script, 0o755)
				return path, func(cmd *exec.Cmd) { cmd.Dir = "/missing/directory" }
			},
			cause:  os.ErrNotExist,
			advice: "create the working directory",
		},
		{
			name: "missing directory with attributes",
			prepare: func(t *testing.T, _ *tableflip.Upgrader) (string, func(*exec.Cmd)) {
				path := writeProgram(t, script, 0o755)
				return path, func(cmd *exec.Cmd) {
					cmd.Dir = "/missing/directory"
					cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
				}
			},
			cause:  os.ErrNotExist,
			advice: "create the working directory",
		},
		{
			name: "too long a variable",
			prepare: func(t *testing.T, _ *tableflip.Upgrader) (string, func(*exec.Cmd)) {
				path := writeProgram(t, script, 0o755)
				return path, func(cmd *exec.Cmd) {
					cmd.Env = append(cmd.Env, "LONG="+strings.Repeat("x", 4<<20))
				}
			},
			cause:  syscall.E2BIG,
			advice: "the environment, ",
		},
		{
			name: "too long names",
			prepare: func(t *testing.T, upg *tableflip.Upgrader) (string, func(*exec.Cmd)) {
				long := strings.Repeat("x", 8<<20)
				proctest.OK(t, upg.AddFile(long, os.Stdin))
				t.Cleanup(func() { upg.RemoveFile(long) })
				return writeProgram(t, script, 0o755), nil
			},
			cause:  syscall.E2BIG,
			advice: "shorter names",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var customize func(*exec.Cmd)
			upg, s := NewParent(t, tableflip.Options{Command: func(cmd *exec.Cmd) {
				if customize != nil {
					customize(cmd)
				}
			}}, "succeed")
			proctest.OK(t, upg.Ready())

			// What prepare changes, its cleanup undoes before the working upgrade.
			t.Run("fails", func(t *testing.T) {
				path, prepared := test.prepare(t, upg)
				customize = func(cmd *exec.Cmd) {
					cmd.Path = path
					if prepared != nil {
						prepared(cmd)
					}
				}
				before := slices.Collect(maps.Values(proctest.OpenFiles(t, os.Getpid())))
				err := upg.Upgrade()
				if !errors.Is(err, test.cause) {
					t.Errorf("got %.300v, want %v", err, test.cause)
				}
				tried := path
				if test.advice == "create the working directory" {
					tried = "/missing/directory"
				}
				for _, want := range []string{"tableflip: ", tried, test.advice} {
					if !strings.Contains(fmt.Sprint(err), want) {
						t.Errorf("got %.1000v, which does not contain %q", err, want)
					}
				}
				for fd, file := range proctest.OpenFiles(t, os.Getpid()) {
					if !slices.Contains(before, file) {
						t.Errorf("descriptor %s, %s, was leaked", fd, file)
					}
				}
			})
			customize = nil
			proctest.OK(t, upg.Upgrade())
			s.Await("ready")
		})
	}
}

// TestStartDescriptors raises the limit of open files, one by one, from
// where there is no free descriptor, until a start gets through.
func TestStartDescriptors(t *testing.T) {
	t.Parallel()
	test := proctest.Opened[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	c, first, _ := startChain(t, linkVariable+"="+test.Addr().String())
	parent := c.upgrade(first) // which has claimed a connection, of which it passes a duplicate on
	proctest.OK(t, os.Remove(filepath.Join(c.dir, "journal")))
	wantNoLeakWithFewDescriptors(t, parent, func() proctest.Message {
		parent.Order("upgrade", proctest.Environment("fail"))
		return parent.Await("upgraded")
	})
	c.wantGoesOn(parent)
}

// wantNoLeakWithFewDescriptors raises the limit of open files of a process, one by one, until
// fail, an upgrade to a child that exits, gets through to that.
func wantNoLeakWithFewDescriptors(t *testing.T, p *proctest.Process, fail func() proctest.Message) {
	t.Helper()
	fail() // the first may open what stays
	before := proctest.OpenFiles(t, p.PID)
	limit := 3
	for before[strconv.Itoa(limit)] != "" {
		limit++
	}
	for more := 0; ; more++ {
		p.LimitDescriptors(limit + more)
		m := fail()
		p.LimitDescriptors(-1)
		if after := proctest.OpenFiles(t, p.PID); !maps.Equal(after, before) {
			t.Errorf("with %d more descriptors: they were %v, and are %v", more, before, after)
		}
		if m.Cause == "exit status 7" {
			return
		}
		if m.Cause != syscall.EMFILE.Error() || !strings.Contains(m.Text, "limit of open files") {
			t.Fatalf("with %d more descriptors: Upgrade returned %q, caused by %q; want %q", more, m.Text, m.Cause, syscall.EMFILE)
		}
	}
}

func TestStartDeletedDir(t *testing.T) {
	t.Parallel()
	c := newChain(t)
	c.workDir = filepath.Join(t.TempDir(), "work")
	proctest.OK(t, os.Mkdir(c.workDir, 0o700))
	parent, _ := c.start()
	parent.AwaitStep(alone)
	before := proctest.OpenFiles(t, parent.PID)

	proctest.OK(t, os.Remove(c.workDir))
	parent.Order("upgrade")
	n := parent.Await("upgraded")
	if n.Cause != syscall.ENOENT.Error() {
		t.Errorf("Upgrade returned %q, caused by %q; want %q", n.Text, n.Cause, syscall.ENOENT)
	}
	for _, want := range []string{"tableflip: ", c.workDir, "create the working directory"} {
		if !strings.Contains(n.Text, want) {
			t.Errorf("Upgrade returned %q, which does not contain %q", n.Text, want)
		}
	}
	if after := proctest.OpenFiles(t, parent.PID); !maps.Equal(after, before) {
		t.Errorf("the descriptors were %v, and are %v", before, after)
	}
	c.wantCharge(parent.PID)

	proctest.OK(t, os.Mkdir(c.workDir, 0o700))
	c.wantGoesOn(parent)
}
