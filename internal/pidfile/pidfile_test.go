//go:build unix

package pidfile

import (
	"errors"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
)

// The PID file on its own. What it does in a handover is in upgrader_test.go.

// wantFiles checks which files a directory holds, with their contents.
func wantFiles(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	proctest.OK(t, err)
	got := map[string]string{}
	for _, entry := range entries {
		if entry.Type().IsRegular() {
			content, err := os.ReadFile(filepath.Join(dir, entry.Name()))
			proctest.OK(t, err)
			got[entry.Name()] = string(content)
		}
	}
	for name, content := range want {
		if got[name] != content {
			t.Errorf("%s holds %q, want %q", name, got[name], content)
		}
		delete(got, name)
	}
	for name, content := range got {
		t.Errorf("%s, which holds %q, should not be there", name, content)
	}
}

func wantMode(t *testing.T, path string, want fs.FileMode) {
	t.Helper()
	info, err := os.Lstat(path)
	proctest.OK(t, err)
	if info.Mode() != want {
		t.Errorf("the mode of %s is %v, want %v", path, info.Mode(), want)
	}
}

func TestFileSteps(t *testing.T) {
	dir := t.TempDir()
	own := string(ownPID())
	f := &File{path: filepath.Join(dir, "pid")}
	proctest.OK(t, os.WriteFile(f.path, []byte("1"), 0o600))

	proctest.OK(t, f.Prepare())
	wantFiles(t, dir, map[string]string{"pid": "1", "pid.tmp": own})
	f.Abandon()
	wantFiles(t, dir, map[string]string{"pid": "1"})
	f.Abandon() // nothing is left to do

	proctest.OK(t, f.Prepare())
	proctest.OK(t, f.Prepare()) // after a first attempt
	proctest.OK(t, f.Commit())
	wantFiles(t, dir, map[string]string{"pid": own})
	if err := f.Commit(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a commit of nothing: got %v", err)
	}
	wantFiles(t, dir, map[string]string{"pid": own})

	proctest.OK(t, f.Remove())
	proctest.OK(t, f.Remove())
	wantFiles(t, dir, nil)
}

func TestFileRemove(t *testing.T) {
	dir := t.TempDir()
	f := &File{path: filepath.Join(dir, "pid")}
	proctest.OK(t, f.Write())
	proctest.OK(t, os.WriteFile(f.path, []byte("1"), 0o600)) // the next generation
	proctest.OK(t, f.Remove())
	wantFiles(t, dir, map[string]string{"pid": "1"})
}

// A process that was never in charge has no business with the file.
func TestFileUnprepared(t *testing.T) {
	dir := t.TempDir()
	f := &File{path: filepath.Join(dir, "pid")}
	t.Chdir(dir)
	files := map[string]string{"pid": string(ownPID()), "pid.tmp": "1", ".tmp": "2"}
	for name, content := range files {
		proctest.OK(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	f.Abandon()
	proctest.OK(t, f.Remove())
	proctest.OK(t, f.Restore(nil))
	wantFiles(t, dir, files)
}

func TestFileNone(t *testing.T) {
	f := &File{}
	proctest.OK(t, f.Prepare())
	proctest.OK(t, f.Commit())
	before, err := f.Read()
	proctest.OK(t, err)
	proctest.OK(t, f.Restore(before))
	f.Abandon()
	proctest.OK(t, f.Remove())
}

func TestFileRestore(t *testing.T) {
	own := string(ownPID())
	for _, test := range []struct {
		name string
		fail func(t *testing.T, child *File) // what a child did before it was killed
	}{
		{"nothing", func(*testing.T, *File) {}},
		{"prepared", func(t *testing.T, child *File) { proctest.OK(t, child.writeTemporary([]byte("1"), 0)) }},
		{"committed", func(t *testing.T, child *File) {
			proctest.OK(t, child.writeTemporary([]byte("1"), 0))
			proctest.OK(t, child.Commit())
		}},
		{"removed", func(_ *testing.T, child *File) { _ = os.Remove(child.path) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			f := &File{path: filepath.Join(dir, "pid")}
			proctest.OK(t, f.Write())
			proctest.OK(t, os.Chmod(f.path, 0o660)) // by its operator
			for range 2 {
				before, err := f.Read()
				proctest.OK(t, err)
				test.fail(t, &File{f.path, f.target})
				proctest.OK(t, f.Restore(before))
				wantFiles(t, dir, map[string]string{"pid": own})
				wantMode(t, f.path, 0o660)
			}

			proctest.OK(t, f.Remove())
			before, err := f.Read()
			proctest.OK(t, err)
			test.fail(t, &File{f.path, f.target})
			proctest.OK(t, f.Restore(before))
			wantFiles(t, dir, nil)
		})
	}
}

// Who watches the file sees no change that is none.
func TestFileRestoreUnchanged(t *testing.T) {
	f := &File{path: filepath.Join(t.TempDir(), "pid")}
	proctest.OK(t, f.Write())
	before, err := f.Read()
	proctest.OK(t, err)
	file := proctest.Must(os.Stat(f.path))
	proctest.OK(t, f.Restore(before))
	if now := proctest.Must(os.Stat(f.path)); !os.SameFile(file, now) {
		t.Error("the file was replaced, and nobody had changed it")
	}
}

// limited calls do while a resource of this process, which nothing else uses then, is
// used up.
func limited(t *testing.T, resource int, do func()) {
	t.Helper()
	var before unix.Rlimit
	proctest.OK(t, unix.Getrlimit(resource, &before))
	none := before
	none.Cur = 0
	proctest.OK(t, unix.Setrlimit(resource, &none))
	do()
	proctest.OK(t, unix.Setrlimit(resource, &before))
}

func TestFileNoDescriptors(t *testing.T) {
	dir := t.TempDir()
	f := &File{path: filepath.Join(dir, "pid")}
	child := File{f.path, f.path}
	var prepareErr, restoreErr error
	limited(t, unix.RLIMIT_NOFILE, func() { prepareErr = f.Prepare() })
	proctest.WantError(t, "prepare", prepareErr, syscall.EMFILE)

	// What the child has put where there was nothing can be removed all the same.
	proctest.OK(t, child.writeTemporary([]byte("1"), 0))
	proctest.OK(t, child.Commit())
	limited(t, unix.RLIMIT_NOFILE, func() { restoreErr = f.Restore(nil) })
	proctest.OK(t, restoreErr)
	wantFiles(t, dir, nil)
}

func TestFileFullDisk(t *testing.T) {
	signal.Ignore(syscall.SIGXFSZ)
	t.Cleanup(func() { signal.Reset(syscall.SIGXFSZ) })
	dir := t.TempDir()
	f := &File{path: filepath.Join(dir, "pid")}
	var err error
	limited(t, unix.RLIMIT_FSIZE, func() { err = f.Prepare() })
	proctest.WantError(t, "prepare", err, syscall.EFBIG)
	wantFiles(t, dir, nil)
}

func TestFileHint(t *testing.T) {
	for _, test := range []struct {
		err  error
		want string
	}{
		{syscall.EACCES, "must be writable"},
		{syscall.ENOENT, "create its directory"},
		{syscall.EIO, ""},
	} {
		if got := hint(test.err); !strings.Contains(got, test.want) || (got == "") != (test.want == "") {
			t.Errorf("%v: got %q, want %q", test.err, got, test.want)
		}
	}
}

func TestFileLink(t *testing.T) {
	for _, test := range []struct{ name, link string }{
		{"relative", "run/real"},
		{"of a link", "another"},
		{"through another directory", "../data/run/real"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			run := filepath.Join(dir, "run")
			proctest.OK(t, os.MkdirAll(run, 0o700))
			proctest.OK(t, os.Symlink(filepath.Join(run, "real"), filepath.Join(dir, "another")))
			f := &File{path: filepath.Join(dir, "pid")}
			proctest.OK(t, os.Symlink(test.link, f.path))

			for range 2 { // at first there is nothing behind the link
				proctest.OK(t, f.Write())
				wantFiles(t, run, map[string]string{"real": string(ownPID())})
				wantFiles(t, dir, nil)
				wantMode(t, f.path, fs.ModeSymlink|0o777)
			}
			proctest.OK(t, f.Remove())
			wantFiles(t, run, nil)
			wantMode(t, f.path, fs.ModeSymlink|0o777)
		})
	}
}

// The link of a deployment leads elsewhere by the time that the next generation has
// its own file there.
func TestFileMovedLink(t *testing.T) {
	dir := t.TempDir()
	for _, release := range []string{"1", "2"} {
		proctest.OK(t, os.Mkdir(filepath.Join(dir, release), 0o700))
	}
	current := filepath.Join(dir, "current")
	proctest.OK(t, os.Symlink("1", current))
	f := &File{path: filepath.Join(current, "pid")}
	proctest.OK(t, f.Write())
	proctest.OK(t, os.Remove(current))
	proctest.OK(t, os.Symlink("2", current))
	proctest.OK(t, os.WriteFile(f.path, []byte("1"), 0o600)) // by the next generation

	proctest.OK(t, f.Remove())
	wantFiles(t, filepath.Join(dir, "1"), nil)
	wantFiles(t, filepath.Join(dir, "2"), map[string]string{"pid": "1"})
}

func TestFileLinkLoop(t *testing.T) {
	f := &File{path: filepath.Join(t.TempDir(), "pid")}
	proctest.OK(t, os.Symlink("pid", f.path))
	proctest.WantError(t, "prepare", f.Prepare(), syscall.ELOOP)
	proctest.WantError(t, "write", f.Write(), syscall.ELOOP)
}

func TestFileNoDirectory(t *testing.T) {
	f := &File{path: filepath.Join(t.TempDir(), "missing", "pid")}
	err := f.Prepare()
	proctest.WantError(t, "prepare", err, fs.ErrNotExist)
	if !strings.Contains(err.Error(), "create its directory") {
		t.Errorf("got %v, without advice", err)
	}
}
