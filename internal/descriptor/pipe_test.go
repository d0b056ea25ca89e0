//go:build unix

package descriptor_test

import (
	"io"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/descriptor"
)

// What this package opens never gets the number of a standard stream, which is free
// once a program has closed that.
func TestPipeStreams(t *testing.T) {
	stdin, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(0); err != nil {
		t.Fatal(err)
	}
	defer func() {
		unix.Close(0)
		if fd, err := unix.Dup(stdin); fd != 0 {
			t.Errorf("standard input is %d, %v", fd, err)
		}
		unix.Close(stdin)
	}()

	r, w, err := descriptor.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if r.Fd() < 3 || w.Fd() < 3 {
		t.Errorf("the pipe has the numbers %d and %d", r.Fd(), w.Fd())
	}
	if _, err := unix.FcntlInt(0, unix.F_GETFD, 0); err == nil {
		t.Error("standard input is still open")
	}
	if _, err := io.WriteString(w, "a"); err != nil {
		t.Error(err)
	}
	w.Close()
	if got, err := io.ReadAll(r); string(got) != "a" {
		t.Errorf("read %q, %v", got, err)
	}

	dup, err := descriptor.Duplicate(2)
	if err != nil {
		t.Fatal(err)
	}
	defer descriptor.Close(dup)
	if dup < 3 {
		t.Errorf("a duplicate has the number %d", dup)
	}
}
