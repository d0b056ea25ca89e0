package registry_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/registry"
)

// What fails leaves no descriptor open, and no file behind.

// openDescriptors returns how many descriptors refer to each file.
func openDescriptors(t *testing.T) map[string]int {
	t.Helper()
	files := map[string]int{}
	for _, fd := range proctest.Must(os.ReadDir("/proc/self/fd")) {
		if file, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil {
			files[file]++
		}
	}
	return files
}

// wantNoneLeft checks that there are no more than before. There may be less, because
// the garbage collector closes what other tests have left open.
func wantNoneLeft(t *testing.T, before map[string]int) {
	t.Helper()
	for file, count := range openDescriptors(t) {
		if count > before[file] && !strings.HasPrefix(file, "/proc/") {
			t.Errorf("%d more descriptors of %s are open", count-before[file], file)
		}
	}
}

// closedBy returns the descriptors that do closes, and puts a file in their places. Who
// closes one of them once more would close that.
func closedBy(t *testing.T, do func()) (reused []int) {
	t.Helper()
	before := proctest.Must(os.ReadDir("/proc/self/fd"))
	do()
	for _, entry := range before {
		fd := proctest.Must(strconv.Atoi(entry.Name()))
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			continue
		}
		if proctest.Must(unix.FcntlInt(2, unix.F_DUPFD_CLOEXEC, fd)) == fd {
			reused = append(reused, fd)
		}
	}
	t.Cleanup(func() {
		for _, fd := range reused {
			unix.Close(fd)
		}
	})
	return reused
}

func wantReused(t *testing.T, when string, reused []int) {
	t.Helper()
	if len(reused) == 0 {
		t.Errorf("%s: nothing was closed", when)
	}
	for _, fd := range reused {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			t.Errorf("%s: descriptor %d, which is another's by now, is closed", when, fd)
		}
	}
}

func TestNothingIsClosedTwice(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	for _, name := range []string{"a", "b"} {
		server, _ := proctest.Connect(t)
		proctest.OK(t, r.AddConn("tcp", name, server))
	}
	proctest.OK(t, r.AddFile("file", os.Stderr))
	proctest.OK(t, proctest.ErrorOf(r.Listen("tcp", "localhost:0")))

	c := child(t, r, registry.Options{})
	claimed := closedBy(t, func() {
		for _, name := range []string{"a", "b"} {
			proctest.Opened[net.Conn](t)(c.Conn("tcp", name))
		}
	})
	proctest.OK(t, c.RemoveConn("tcp", "a"))
	wantReused(t, "RemoveConn", claimed)
	if conn := proctest.Must(c.Conn("tcp", "a")); conn != nil {
		t.Errorf("%v is claimed once more", conn)
	}
	stopped := closedBy(t, func() { c.Stop(false, errStopped) })
	if slices.ContainsFunc(stopped, func(fd int) bool { return slices.Contains(claimed, fd) }) {
		t.Errorf("Stop has closed %v, of which others had got %v", stopped, claimed)
	}
	c.Stop(true, errStopped)
	wantReused(t, "Stop twice", stopped)

	handedOver := closedBy(t, func() { r.HandOver(errStopped) })
	r.Stop(true, errStopped)
	wantReused(t, "Stop after HandOver", handedOver)
}

// withDescriptors calls do while this process can open no more than count descriptors.
func withDescriptors(t *testing.T, count int, do func()) {
	t.Helper()
	var free []int
	for range count + 1 {
		free = append(free, proctest.Must(unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 3)))
	}
	for _, fd := range free {
		unix.Close(fd)
	}
	var before unix.Rlimit
	proctest.OK(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &before))
	proctest.OK(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free[count]), Max: before.Max}))
	do()
	proctest.OK(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &before))
}

func TestFreezeWithoutDescriptors(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	for _, name := range []string{"a", "b"} {
		server, _ := proctest.Connect(t)
		proctest.OK(t, r.AddConn("tcp", name, server))
	}
	c := child(t, r, registry.Options{})
	for _, name := range []string{"a", "b"} {
		proctest.Opened[net.Conn](t)(c.Conn("tcp", name))
	}
	before := openDescriptors(t)
	var err error
	withDescriptors(t, 1, func() { _, _, _, err = c.FreezeForChild() })
	proctest.WantError(t, "FreezeForChild", err, unix.EMFILE)
	wantNoneLeft(t, before)
	proctest.OK(t, c.RemoveConn("tcp", "a")) // nothing is frozen
}

func TestClosedConnIsForgotten(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	server, _ := proctest.Connect(t)
	proctest.OK(t, r.AddConn("tcp", "a", server))
	c := child(t, r, registry.Options{})
	proctest.OK(t, proctest.Must(c.Conn("tcp", "a")).Close())
	child(t, c, registry.Options{})
	proctest.WantError(t, "RemoveConn", c.RemoveConn("tcp", "a"), os.ErrNotExist)
}

func TestFilesWithoutDescriptors(t *testing.T) {
	r := firstGeneration(t, registry.Options{})
	for _, name := range []string{"a", "b"} {
		proctest.OK(t, r.AddFile(name, os.Stderr))
	}
	c := child(t, r, registry.Options{})
	before := openDescriptors(t)
	var err error
	withDescriptors(t, 1, func() { _, err = c.Files() })
	proctest.WantError(t, "Files", err, unix.EMFILE)
	wantNoneLeft(t, before)
	if files := proctest.Must(c.Files()); len(files) != 2 {
		t.Errorf("later, Files returns %v", files)
	}
}

func TestRefusedAddLeavesNothing(t *testing.T) {
	path := filepath.Join(proctest.SocketDir(t), "s")
	r := firstGeneration(t, registry.Options{})
	file := proctest.Opened[*os.File](t)(os.Open(os.DevNull))
	before := openDescriptors(t)
	if r.AddListener("tcp", "a", fdListener{file: file}, true) == nil {
		t.Error("a file is accepted as a listener")
	}
	_, err := r.ListenPacketWithCallback("unixgram", path, func(network, addr string) (net.PacketConn, error) {
		r.HandOver(errStopped) // it does not wait for who creates a socket
		return net.ListenPacket(network, addr)
	})
	proctest.WantError(t, "ListenPacket", err, errStopped)
	if proctest.Exists(path) {
		t.Error("the file of a socket that was refused is left behind")
	}
	if err := r.AddFile("a", file); !errors.Is(err, errStopped) {
		t.Errorf("AddFile: %v", err)
	}
	wantNoneLeft(t, before)
}
