package descriptor_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/descriptor"
)

// A pipe that can't be moved above the streams leaves nothing open.
func TestPipeWithoutDescriptors(t *testing.T) {
	closeStream(t, 0)
	free := 3
	for isOpen(uintptr(free)) {
		free++
	}
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	limit := before
	limit.Cur = uint64(free) + 1 // room for the pipe, as 0 and this
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	_, _, pipeErr := descriptor.Pipe()
	_, scratchErr := new(descriptor.Scratch).File(1)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{pipeErr, scratchErr} {
		if !errors.Is(err, unix.EMFILE) {
			t.Errorf("got %v", err)
		}
	}
	for _, fd := range []uintptr{0, uintptr(free)} {
		if isOpen(fd) {
			t.Errorf("descriptor %d is still open", fd)
		}
	}
}

// Who asks whether a socket is dead keeps nothing of it open.
func TestIsDeadLeavesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	conn, err := net.ListenPacket("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := count()
	if descriptor.IsDead(path) {
		t.Error("a socket that is open is dead")
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
