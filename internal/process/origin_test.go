//go:build unix

package process_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/proctest"
)

func init() {
	// origin reports what it was started with, after it has changed all of that.
	proctest.Role("origin", func() {
		for i := range os.Args {
			os.Args[i] = "changed"
		}
		os.Setenv("PATH", "/nonexistent")
		os.Setenv("PWD", "/nonexistent")
		proctest.Must(0, os.Chdir("/"))

		path, err := process.Path()
		proctest.Report("args", strings.Join(process.Args(), " "))
		proctest.Report("dir", process.Dir())
		proctest.Report("path", path, err)
		file, fileErr := process.FromDir("a/../b")
		proctest.Report("file", file)
		proctest.Report("file-error", fileErr)
	})
}

// startOrigin starts the role in dir, under the name argv0. The process executes this
// binary, whatever its name is.
func startOrigin(t *testing.T, dir, argv0 string, env ...string) *proctest.Service {
	t.Helper()
	s := proctest.NewService(t)
	cmd := s.Command("origin", env...)
	cmd.Path = proctest.Must(os.Executable())
	cmd.Args = []string{argv0}
	cmd.Dir = dir
	proctest.OK(t, cmd.Run())
	return s
}

// release makes a directory with a program in it, this binary, and a link to it, as
// deployment tools have it.
func release(t *testing.T) (current, physical string) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	proctest.OK(t, err)
	physical, current = filepath.Join(dir, "1"), filepath.Join(dir, "current")
	proctest.OK(t, os.MkdirAll(filepath.Join(physical, "bin"), 0o700))
	proctest.OK(t, os.Link(proctest.Must(os.Executable()), filepath.Join(physical, "bin", "program")))
	proctest.OK(t, os.Symlink("1", current))
	return current, physical
}

func TestArgs(t *testing.T) {
	s := proctest.NewService(t)
	cmd := s.Command("origin")
	cmd.Args = []string{os.Args[0], "serve", "-addr", ":80"}
	proctest.OK(t, cmd.Run())
	want := strings.Join(cmd.Args, " ")
	if got := s.Await("args").Text; got != want {
		t.Errorf("got %q, want %q", got, want)
	}

	before := slices.Clone(process.Args())
	process.Args()[0] = "changed"
	if after := process.Args(); !slices.Equal(after, before) {
		t.Errorf("the caller changed what it got for all: %q", after)
	}
}

func TestDir(t *testing.T) {
	current, physical := release(t)
	for _, test := range []struct{ name, pwd, argv0, want string }{
		{"named by PWD", current, "./bin/program", current},
		{"named by PWD and by the binary", physical, current + "/bin/program", physical},
		{"PWD names another", "/", current + "/bin/program", current},
		{"PWD is relative", "current", current + "/bin/program", current},
		{"named by the binary", "", current + "/bin/program", current},
		{"binary is elsewhere", "", "/usr/bin/program", physical},
		{"binary is relative", "", "./bin/program", physical},
		{"no slash", "", "program", physical},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := startOrigin(t, current, test.argv0, "PWD="+test.pwd)
			if got := s.Await("dir").Text; got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
			if got, want := s.Await("file").Text, test.want+"/a/../b"; got != want {
				t.Errorf("a relative path is %s, want %s", got, want)
			}
		})
	}
}

// What was relative to a directory that is gone is nowhere.
func TestDirGone(t *testing.T) {
	s := proctest.NewService(t)
	cmd := s.Command("origin")
	proctest.Shell(`cd "$(mktemp -d)" && rmdir "$PWD" && exec "$0"`)(cmd)
	proctest.OK(t, cmd.Run())
	if got := s.Await("file").Text; got != "" {
		t.Errorf("a relative path is %q", got)
	}
	if got := s.Await("file-error").Text; !strings.Contains(got, "working directory was not known") {
		t.Errorf("a relative path has the error %q", got)
	}
}

func TestFromDirEmpty(t *testing.T) {
	if got, err := process.FromDir(""); got != "" || err != nil {
		t.Errorf("no path is %q, %v", got, err)
	}
}

func TestPath(t *testing.T) {
	current, _ := release(t)
	bin := filepath.Join(current, "bin")
	stranger := t.TempDir()
	proctest.OK(t, os.WriteFile(filepath.Join(stranger, "program"), []byte("#!/bin/sh\n"), 0o700))
	for _, test := range []struct {
		name, argv0, path string
		want              []string
	}{
		{"absolute", bin + "/program", stranger, []string{bin + "/program <nil>"}},
		{"relative", "./bin/program", stranger, []string{current + "/./bin/program <nil>"}},
		{"of another program", stranger + "/program", stranger, []string{stranger + "/program <nil>"}},
		{"found by PATH", "program", "/nonexistent:" + bin, []string{bin + "/program <nil>"}},
		{"found by a relative PATH", "program", "bin", []string{current + "/bin/program <nil>"}},
		{"another program", "program", stranger + ":" + bin, []string{stranger + "/program", "another program", "Options.Command"}},
		{"not in PATH", "program", "/nonexistent", []string{"not found", "Options.Command"}},
		{"empty", "", stranger, []string{"argv[0]", "Options.Command"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := startOrigin(t, current, test.argv0, "PWD="+current, "PATH="+test.path)
			got := s.Await("path").Text
			for _, want := range test.want {
				if !strings.Contains(got, want) {
					t.Errorf("got %q, which does not contain %q", got, want)
				}
			}
		})
	}
}
