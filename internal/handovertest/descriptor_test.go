//go:build unix

package handovertest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// These tests count the descriptors of a process.

// A claim makes a descriptor for the caller and keeps one, no more.
func TestDescriptorsAfterStop(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "count-descriptors")
	for i := range 10 {
		proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
		proctest.Opened[net.PacketConn](t)(upg.ListenPacket("udp", "localhost:0"))
		proctest.OK(t, upg.AddFile(strconv.Itoa(i), os.Stderr))
		server, _ := proctest.Connect(t)
		proctest.OK(t, upg.AddConn("tcp", strconv.Itoa(i), server))
	}
	Upgrade(t, upg)
	// Both pipes and the handle of the parent's process tell of the ends of both.
	if m := s.Await("closed"); m.Text != "40" {
		t.Errorf("of 40 descriptors, %s are closed", m.Text)
	}
}

func init() {
	proctest.Role("count-descriptors", func() {
		debug.SetGCPercent(-1)
		// Have the runtime open what it needs first.
		read, write, err := os.Pipe()
		proctest.Must(0, errors.Join(err, read.Close(), write.Close()))
		before := proctest.OpenDescriptors()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		for i := range 9 {
			proctest.Must(upg.Listener("tcp", "localhost:0")).Close()
			proctest.Must(upg.PacketConn("udp", "localhost:0")).Close()
			proctest.Must(upg.File(strconv.Itoa(i))).Close()
			proctest.Must(upg.Conn("tcp", strconv.Itoa(i))).Close()
		}
		MustBeReady(upg)
		upg.Stop()
		proctest.Report("closed", before-proctest.OpenDescriptors())
	})
}

// foreignDescriptors returns which files, pipes and sockets this process has beside
// the standard streams.
func foreignDescriptors() []string {
	var found []string
	for fd := 3; fd < 1024; fd++ {
		var stat unix.Stat_t
		if unix.Fstat(fd, &stat) != nil {
			continue
		}
		switch stat.Mode & unix.S_IFMT {
		case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK:
			link, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
			found = append(found, fmt.Sprint(fd, "=", link))
		}
	}
	return found
}

func init() {
	// subprocess is started by a generation, but is none.
	proctest.Role("subprocess", func() {
		descriptors, variables := foreignDescriptors(), Variables()
		upg, err := tableflip.New(tableflip.Options{})
		if err != nil {
			proctest.Report("subprocess", err)
			return
		}
		proctest.Report("subprocess", upg.HasParent(), descriptors, variables, upg.Ready())
	})
	proctest.Role("start-subprocess", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Must(upg.Listen("tcp", "localhost:0"))
		proctest.Must(upg.ListenPacket("udp", "localhost:0"))
		proctest.Must(upg.File("file"))
		for _, moment := range []string{"before Ready", "after Ready"} {
			if moment == "after Ready" {
				MustBeReady(upg)
			}
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), proctest.Environment("subprocess"))
			cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
			proctest.Must(0, cmd.Run())
		}
	})
}
