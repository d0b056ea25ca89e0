//go:build unix

package descriptor_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/descriptor"
)

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestPoll(t *testing.T) {
	r, w, err := os.Pipe()
	ok(t, err)
	defer r.Close()
	want := func(when string, wantReadable, wantHungUp bool) {
		t.Helper()
		readable, hungUp, err := descriptor.PollOf(r)
		if readable != wantReadable || hungUp != wantHungUp || err != nil {
			t.Errorf("%s: readable %v, hung up %v, %v", when, readable, hungUp, err)
		}
	}
	want("empty", false, false)
	w.Write([]byte("a"))
	want("with a byte", true, false)
	w.Close()
	want("closed, with a byte", true, true)
	r.Read(make([]byte, 1))
	if _, hungUp, err := descriptor.PollOf(r); !hungUp || err != nil {
		t.Errorf("closed: hung up %v, %v", hungUp, err)
	}
	r.Close()
	if _, _, err := descriptor.PollOf(r); !descriptor.IsClosed(err) {
		t.Errorf("of a closed file: %v", err)
	}
	if readable, hungUp := descriptor.Poll(1 << 30); readable || hungUp {
		t.Errorf("of no descriptor: readable %v, hung up %v", readable, hungUp)
	}
}

func TestIsClosed(t *testing.T) {
	for _, err := range []error{os.ErrClosed, net.ErrClosed, &os.PathError{Err: unix.EBADF}} {
		if !descriptor.IsClosed(err) {
			t.Errorf("%v says that something was closed", err)
		}
	}
	for _, err := range []error{nil, unix.EMFILE, os.ErrNotExist} {
		if descriptor.IsClosed(err) {
			t.Errorf("%v does not say that something was closed", err)
		}
	}
}

func TestIdentifyPipe(t *testing.T) {
	file, err := os.Open(os.DevNull)
	ok(t, err)
	defer file.Close()
	err = descriptor.Control(file, func(fd uintptr) error {
		_, _, err := descriptor.IdentifyPipe(fd)
		return err
	})
	if err == nil {
		t.Error("a file is a pipe")
	}
	if _, _, err := descriptor.IdentifyPipe(1 << 30); !errors.Is(err, unix.EBADF) {
		t.Errorf("of no descriptor: %v", err)
	}
}

func TestIdentifyFile(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	ok(t, os.WriteFile(file, nil, 0o600))
	ok(t, os.Symlink(file, link))
	identify := func(path string, follow bool) string {
		id, isSocket, err := descriptor.IdentifyFile(path, follow)
		if err != nil || isSocket {
			t.Errorf("%s: a socket: %v, %v", path, isSocket, err)
		}
		return id
	}
	if identify(link, true) != identify(file, true) || identify(file, true) != identify(file, false) {
		t.Error("a link does not lead to its file")
	}
	if identify(link, false) == identify(file, false) {
		t.Error("a link is its file")
	}
	if _, _, err := descriptor.IdentifyFile(filepath.Join(dir, "none"), false); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of no file: %v", err)
	}
}

func TestIdentifySocket(t *testing.T) {
	if _, err := descriptor.IdentifySocket(1 << 30); !errors.Is(err, unix.EBADF) {
		t.Errorf("of no descriptor: %v", err)
	}
}

func TestScratchAgain(t *testing.T) {
	file, err := os.Open(os.DevNull)
	ok(t, err)
	defer file.Close()
	var s descriptor.Scratch
	for range 2 {
		ok(t, descriptor.Control(file, func(fd uintptr) error {
			_, err := s.File(fd)
			return err
		}))
		ok(t, s.Close())
	}
	ok(t, s.Close())
}

func TestSetCloseOnExec(t *testing.T) {
	const first, n = 200, 5
	for fd := first; fd < first+n; fd++ {
		if _, err := unix.FcntlInt(1, unix.F_DUPFD, fd); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
	}
	if closed, err := descriptor.SetCloseOnExec(first, n); err != nil {
		t.Errorf("of %d: %v", closed, err)
	}
	for fd := uintptr(first); fd < first+n; fd++ {
		if closes, err := descriptor.IsCloseOnExec(fd); !closes || err != nil {
			t.Errorf("descriptor %d stays open on exec: %v", fd, err)
		}
	}

	ok(t, unix.Close(first+3))
	if closed, err := descriptor.SetCloseOnExec(first, n); closed != first+3 || !errors.Is(err, unix.EBADF) {
		t.Errorf("without descriptor %d: %d, %v", first+3, closed, err)
	}
	if _, err := descriptor.SetCloseOnExec(first, 0); err != nil {
		t.Errorf("of no descriptors: %v", err)
	}
}

func TestCloseAll(t *testing.T) {
	fds := []uintptr{204, 300, 202, 203}
	for _, fd := range append(slices.Clone(fds), 201, 205) {
		if _, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, int(fd)); err != nil {
			t.Fatal(err)
		}
	}
	ok(t, descriptor.CloseAll(slices.Clone(fds)))
	for _, fd := range fds {
		if isOpen(fd) {
			t.Errorf("descriptor %d is still open", fd)
		}
	}
	if err := descriptor.CloseAll([]uintptr{205, 300, 201}); !errors.Is(err, unix.EBADF) {
		t.Errorf("of one that is closed: %v", err)
	}
	for _, fd := range []uintptr{201, 205} {
		if isOpen(fd) {
			t.Errorf("descriptor %d is still open", fd)
		}
	}
	ok(t, descriptor.CloseAll(nil))
}
