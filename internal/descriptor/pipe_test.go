//go:build unix

package descriptor_test

import (
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/descriptor"
)

// What this package opens never gets the number of a standard stream, which is free
// once a program has closed that.
func TestPipeStreams(t *testing.T) {
	closeStream(t, 0)
	closeStream(t, 2)
	r, w, err := descriptor.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if r < 3 || w < 3 {
		t.Errorf("the pipe has the numbers %d and %d", r, w)
	}
	for _, stream := range []uintptr{0, 2} {
		if isOpen(stream) {
			t.Errorf("descriptor %d is still open", stream)
		}
	}
	read, err := descriptor.PolledFile(r, "read")
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	write := os.NewFile(w, "write")
	if _, err := io.WriteString(write, "a"); err != nil {
		t.Error(err)
	}
	write.Close()
	if got, err := io.ReadAll(read); string(got) != "a" {
		t.Errorf("read %q, %v", got, err)
	}

	dup, err := descriptor.Duplicate(1)
	if err != nil {
		t.Fatal(err)
	}
	defer descriptor.Close(dup)
	if dup < 3 {
		t.Errorf("a duplicate has the number %d", dup)
	}
}

// closeStream closes a standard stream until the end of the test.
func closeStream(t *testing.T, stream int) {
	t.Helper()
	saved, err := unix.FcntlInt(uintptr(stream), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(stream); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(stream)
		if fd, err := unix.FcntlInt(uintptr(saved), unix.F_DUPFD, stream); fd != stream {
			t.Errorf("descriptor %d is %d, %v", stream, fd, err)
		}
		unix.Close(saved)
	})
}

func isOpen(fd uintptr) bool {
	_, err := unix.FcntlInt(fd, unix.F_GETFD, 0)
	return err == nil
}
