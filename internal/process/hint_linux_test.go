package process_test

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/proctest"
)

const script = "#!/bin/sh\nexit 7\n"

// weakVariable is set where root may do no more than the modes of files allow.
const weakVariable = "PROCESS_TEST_WEAK"

// TestHint has each cause of a failed start found out.
func TestHint(t *testing.T) {
	if os.Getuid() == 0 && os.Getenv(weakVariable) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestHint$")
		cmd.Env = append(os.Environ(), weakVariable+"=1")
		output := &strings.Builder{}
		cmd.Stdout, cmd.Stderr = output, output
		if err := runWithout(t, cmd, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH); err != nil {
			t.Errorf("%v\n%s", err, output)
		}
		return
	}

	self, err := os.ReadFile(proctest.Must(os.Executable()))
	proctest.OK(t, err)
	system := runtime.GOOS + "/" + runtime.GOARCH
	tests := []struct {
		name string
		// prepare changes a command that would work, whose path is in a directory of
		// its own.
		prepare func(t *testing.T, cmd *exec.Cmd)
		cause   error
		want    string
	}{
		{"missing binary", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.Remove(cmd.Path))
		}, unix.ENOENT, "put the new binary, built by go build"},
		{"missing directory of the binary", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.Rename(filepath.Dir(cmd.Path), filepath.Dir(cmd.Path)+".old"))
		}, unix.ENOENT, "put the new binary, built by go build"},
		{"link to nothing", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.Rename(cmd.Path, cmd.Path+".old"))
			proctest.OK(t, os.Symlink("releases/7", cmd.Path))
		}, unix.ENOENT, "is a link to releases/7, which is missing"},
		{"link to itself", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.Remove(cmd.Path))
			proctest.OK(t, os.Symlink("program", cmd.Path))
		}, unix.ELOOP, "leads to itself"},
		{"directory", func(t *testing.T, cmd *exec.Cmd) {
			cmd.Path = filepath.Dir(cmd.Path)
		}, unix.EACCES, "is a directory"},
		{"file as a directory", func(t *testing.T, cmd *exec.Cmd) {
			cmd.Path += "/program"
		}, unix.ENOTDIR, "is not a directory"},
		{"pipe", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.Remove(cmd.Path))
			proctest.OK(t, unix.Mkfifo(cmd.Path, 0o700))
		}, unix.EACCES, "is not a regular file"},
		{"not executable", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.Chmod(cmd.Path, 0o644))
		}, unix.EACCES, "/program executable for this user (chmod +x)"},
		{"executable for others", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.Chmod(cmd.Path, 0o655))
		}, unix.EACCES, "/program executable for this user (chmod +x)"},
		{"directory of the binary forbidden", func(t *testing.T, cmd *exec.Cmd) {
			forbid(t, filepath.Dir(cmd.Path))
		}, unix.EACCES, "may not search a directory of that path"},
		{"noexec", func(t *testing.T, cmd *exec.Cmd) {
			moveToNoexec(t, cmd)
		}, unix.EACCES, "mounted noexec"},
		{"interpreter not executable", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.WriteFile(cmd.Path, []byte("#!"+program(t, "", 0o644)+" -x\n"), 0o700))
		}, unix.EACCES, "/program executable for this user (chmod +x)"},
		{"missing interpreter", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.WriteFile(cmd.Path, []byte("#! /opt/missing/python -u\n"), 0o700))
		}, unix.ENOENT, `install the interpreter that it names, "/opt/missing/python"`},
		{"interpreter with a line end of DOS", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.WriteFile(cmd.Path, []byte("#!/bin/sh\r\n"), 0o700))
		}, unix.ENOENT, `install the interpreter that it names, "/bin/sh\r"`},
		{"missing loader", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.WriteFile(cmd.Path, withLoader("/lib/ld-missing.so.1"), 0o700))
		}, unix.ENOENT, "install the loader"},
		{"empty", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.WriteFile(cmd.Path, nil, 0o700))
		}, unix.ENOEXEC, "is empty: copy it again"},
		{"first bytes", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.WriteFile(cmd.Path, self[:60], 0o700))
		}, unix.ENOEXEC, "is incomplete: copy it again"},
		{"first part", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.WriteFile(cmd.Path, self[:100], 0o700))
		}, nil, "is incomplete: copy it again"},
		{"another machine", func(t *testing.T, cmd *exec.Cmd) {
			foreign := append([]byte(nil), self...)
			binary.LittleEndian.PutUint16(foreign[18:], 0xfeed)
			proctest.OK(t, os.WriteFile(cmd.Path, foreign, 0o700))
		}, unix.ENOEXEC, "is not a program for this system: build the new binary for " + system},
		{"another system", func(t *testing.T, cmd *exec.Cmd) {
			proctest.OK(t, os.WriteFile(cmd.Path, []byte("MZ\x90\x00 a program of Windows"), 0o700))
		}, unix.ENOEXEC, "neither a script that begins with #! nor a program"},
		{"working directory missing", func(t *testing.T, cmd *exec.Cmd) {
			cmd.Dir = "/missing/directory"
		}, unix.ENOENT, "create the working directory /missing/directory again"},
		{"working directory missing, attributes", func(t *testing.T, cmd *exec.Cmd) {
			cmd.Dir = "/missing/directory"
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		}, unix.ENOENT, "create the working directory /missing/directory again"},
		{"working directory forbidden", func(t *testing.T, cmd *exec.Cmd) {
			cmd.Dir = t.TempDir()
			forbid(t, cmd.Dir)
		}, unix.EACCES, "may not enter the working directory "},
		{"working directory is a file", func(t *testing.T, cmd *exec.Cmd) {
			cmd.Dir = cmd.Path
		}, unix.ENOTDIR, "is not a directory: make it one"},
		{"working directory leads to itself", func(t *testing.T, cmd *exec.Cmd) {
			cmd.Dir = filepath.Join(t.TempDir(), "link")
			proctest.OK(t, os.Symlink("link", cmd.Dir))
		}, unix.ELOOP, "the working directory "},
		{"root directory missing", func(t *testing.T, cmd *exec.Cmd) {
			chroot(t, cmd, "/missing/directory")
		}, unix.ENOENT, "create the directory of SysProcAttr.Chroot, /missing/directory again"},
		{"binary missing in the root directory", func(t *testing.T, cmd *exec.Cmd) {
			chroot(t, cmd, t.TempDir())
			cmd.Path = "/bin/sh"
		}, unix.ENOENT, "where the old one was in /"},
		{"interpreter missing in the root directory", func(t *testing.T, cmd *exec.Cmd) {
			chroot(t, cmd, filepath.Dir(cmd.Path))
			cmd.Path = "/program"
		}, unix.ENOENT, `install the interpreter that it names, "/bin/sh" in /`},
		{"working directory missing in the root directory", func(t *testing.T, cmd *exec.Cmd) {
			cmd.Dir = t.TempDir()
			chroot(t, cmd, filepath.Dir(cmd.Path))
			cmd.Path = "/program"
		}, unix.ENOENT, "create the working directory "},
		{"forbidden to another user", func(t *testing.T, cmd *exec.Cmd) {
			needsRoot(t)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: otherUser, Gid: otherUser}}
		}, unix.EACCES, "user 54321, whom Options.Command chose, may not enter"},
		{"too large an environment", func(t *testing.T, cmd *exec.Cmd) {
			cmd.Env = []string{"LONG=" + strings.Repeat("x", 4<<20)}
		}, unix.E2BIG, "the environment, "},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := program(t, script, 0o700)
			cmd := &exec.Cmd{Path: path, Args: []string{path}}
			test.prepare(t, cmd)
			_, err := process.Start(t.Context(), cmd, nil, false)
			if test.cause != nil && !errors.Is(err, test.cause) {
				t.Errorf("got %v, want %v", err, test.cause)
			}
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), cmd.Path) {
				t.Errorf("got %.1000v, want %q", err, test.want)
			}
		})
	}
}

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can mount, chroot and become another user")
	}
}

func chroot(t *testing.T, cmd *exec.Cmd, dir string) {
	t.Helper()
	needsRoot(t)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: dir}
}

// forbid takes away what it takes to enter a directory.
func forbid(t *testing.T, dir string) {
	t.Helper()
	proctest.OK(t, os.Chmod(dir, 0o600))
	t.Cleanup(func() { os.Chmod(dir, 0o700) })
}

func moveToNoexec(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_NOEXEC, "size=1m"); err != nil {
		t.Skip("root may not mount here, as in most containers:", err)
	}
	t.Cleanup(func() { proctest.OK(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	cmd.Path = filepath.Join(dir, "program")
	proctest.OK(t, os.WriteFile(cmd.Path, []byte(script), 0o700))
}

// withLoader is a program of this machine that names its loader, and holds nothing else.
func withLoader(loader string) []byte {
	self, err := os.Open("/proc/self/exe")
	proctest.Must(0, err)
	defer self.Close()
	file := make([]byte, 64+56)
	proctest.Must(self.ReadAt(file[:64], 0))
	binary.LittleEndian.PutUint64(file[32:], 64) // program headers
	binary.LittleEndian.PutUint64(file[40:], 0)  // section headers
	binary.LittleEndian.PutUint16(file[56:], 1)  // program headers
	binary.LittleEndian.PutUint16(file[60:], 0)  // section headers
	header, name := file[64:], append([]byte(loader), 0)
	binary.LittleEndian.PutUint32(header, 3) // PT_INTERP
	binary.LittleEndian.PutUint64(header[8:], uint64(len(file)))
	binary.LittleEndian.PutUint64(header[32:], uint64(len(name)))
	binary.LittleEndian.PutUint64(header[40:], uint64(len(name)))
	return append(file, name...)
}

// A program whose end is missing may be started, and die of that.
func TestHintOfDead(t *testing.T) {
	self, err := os.ReadFile(proctest.Must(os.Executable()))
	proctest.OK(t, err)
	for _, test := range []struct {
		name, content string
		want          string
	}{
		{"half a program", string(self[:len(self)/2]), "is incomplete: copy it again"},
		{"program", string(self), ""},
		{"script", script, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := program(t, test.content, 0o700)
			cmd := &exec.Cmd{Path: path, Args: []string{path, "-test.run=^$", "-no-such-flag"}}
			p, err := process.Start(t.Context(), cmd, nil, false)
			proctest.OK(t, err)
			proctest.Within(t, "the process to exit", p.Exited())
			if p.Err() == nil {
				t.Error("it has succeeded")
			}
			if got := p.Hint(); !strings.Contains(got, test.want) || (got == "") != (test.want == "") {
				t.Errorf("it died (%v), and the hint is %q", p.Err(), got)
			}
		})
	}
}
