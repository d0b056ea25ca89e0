package handovertest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/proctest"
)

// These tests are about processes that inherit descriptors of others, or run out of
// descriptors.

// In cloudflare/tableflip v1.2.3 a marker variable and descriptors 3 and 4 leak to the
// child's subprocesses, whose New then fails.
func TestSubprocess(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "start-subprocess")
	for _, err := range []error{
		proctest.ErrorOf(upg.Listen("tcp", "localhost:0")),
		proctest.ErrorOf(upg.ListenPacket("udp", "localhost:0")),
		upg.AddFile("file", os.Stderr),
	} {
		proctest.OK(t, err)
	}
	server, _ := proctest.Connect(t)
	proctest.OK(t, upg.AddConn("tcp", "nobody claims it", server))
	Upgrade(t, upg)
	got := []string{s.Await("subprocess").Text, s.Await("subprocess").Text}

	// The runtime opens files, and this test may have inherited some itself.
	control := s.Command("subprocess")
	proctest.OK(t, control.Run())
	want := s.Await("subprocess").Text
	for i, moment := range []string{"before Ready", "after Ready"} {
		if got[i] != want {
			t.Errorf("%s, HasParent, descriptors, variables and Ready of a subprocess: %s, want %s", moment, got[i], want)
		}
	}
	if !strings.HasPrefix(want, "false [") || !strings.HasSuffix(want, "] [] <nil>") {
		t.Errorf("and of a process that none is the parent of: %s", want)
	}
}

func TestTableLeaked(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "leak")
	proctest.OK(t, upg.AddFile("file", os.Stderr))
	Upgrade(t, upg)
	for range 6 {
		leak, m := s.Await("leaks"), s.Await("leaked-to")
		want := "false [] <nil> "
		if strings.HasPrefix(leak.Text, "pipes") {
			want += "texttext"
		}
		if m.Text != want {
			t.Errorf("with 3 and 4 being %s: %q, want %q", leak.Text, m.Text, want)
		}
	}
}

func init() {
	// leak starts a process that does not belong to its service, with its variables.
	// That process also finds two pipes as 3 and 4.
	proctest.Role("leak", func() {
		variables := inherit.Variables()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		for _, descriptors := range []string{"none", "pipes", "files"} {
			for _, version := range []string{"1", "2"} {
				cmd := exec.Command(os.Args[0])
				cmd.Env = os.Environ()
				for name, value := range variables {
					if header, ok := strings.CutPrefix(value, "1 "); ok && name == inherit.Variable {
						// The time until which its sender waits has passed.
						value = version + " " + late.ReplaceAllString(header, "until=1")
					}
					cmd.Env = append(cmd.Env, name+"="+value)
				}
				cmd.Env = append(cmd.Env, proctest.Environment("leaked-to"), proctest.WithArg(descriptors))
				cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
				switch descriptors {
				case "pipes":
					var text *os.File
					for range 2 {
						read, write, err := os.Pipe()
						proctest.Must(0, err)
						proctest.Must(write.WriteString("text"))
						write.Close()
						text = read
						cmd.ExtraFiles = append(cmd.ExtraFiles, text)
					}
				case "files":
					cmd.ExtraFiles = []*os.File{os.Stderr, os.Stderr}
				}
				proctest.Report("leaks", descriptors, version)
				proctest.Must(0, cmd.Run())
			}
		}
	})
	proctest.Role("leaked-to", func() {
		upg, err := tableflip.New(tableflip.Options{})
		if err != nil {
			proctest.Report("leaked-to", err)
			return
		}
		text := ""
		if proctest.Arg() == "pipes" {
			for _, fd := range []uintptr{3, 4} {
				text += string(proctest.Must(io.ReadAll(os.NewFile(fd, ""))))
			}
		}
		proctest.Report("leaked-to", upg.HasParent(), Variables(), upg.Ready(), text)
	})
}

// fillDescriptors opens descriptors until all below next are in use, and none above.
func fillDescriptors() (next uint64, unfill func()) {
	var highest uint64 // which can be above 4000 after a test of many listeners
	for _, entry := range proctest.Must(os.ReadDir("/proc/self/fd")) {
		highest = max(highest, proctest.Must(strconv.ParseUint(entry.Name(), 10, 64)))
	}
	var filling []int
	for next <= highest {
		fd := proctest.Must(unix.Dup(0))
		filling = append(filling, fd)
		next = uint64(fd) + 1
	}
	return next, func() {
		for _, fd := range filling {
			unix.Close(fd)
		}
	}
}

// A child that is out of descriptors can make room and go on.
func TestDescriptorsInChild(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "out-of-descriptors")
	for _, err := range []error{
		proctest.ErrorOf(upg.Listen("tcp", "localhost:0")),
		proctest.ErrorOf(upg.ListenPacket("udp", "localhost:0")),
		upg.AddFile("file", os.Stderr),
		upg.AddFile("file 2", os.Stderr),
	} {
		proctest.OK(t, err)
	}
	server, _ := proctest.Connect(t)
	proctest.OK(t, upg.AddConn("tcp", "", server))
	Upgrade(t, upg)
	for range 5 {
		if m := s.Await("claimed"); !strings.HasPrefix(m.Text, "true <nil> true ") {
			t.Errorf("EMFILE at first, then no error and a result: %s", m.Text)
		}
	}
}

func init() {
	proctest.Role("out-of-descriptors", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		var limit unix.Rlimit
		proctest.Must(0, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
		try := func(claim func() (bool, error)) {
			next, unfill := fillDescriptors()
			unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: next, Max: limit.Max})
			_, limited := claim()
			unfill()
			unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
			ok, err := claim()
			proctest.Report("claimed", errors.Is(limited, syscall.EMFILE), err, ok, limited)
		}
		try(func() (bool, error) { ln, err := upg.Listener("tcp", "localhost:0"); return ln != nil, err })
		try(func() (bool, error) { conn, err := upg.PacketConn("udp", "localhost:0"); return conn != nil, err })
		try(func() (bool, error) { conn, err := upg.Conn("tcp", ""); return conn != nil, err })
		try(func() (bool, error) { file, err := upg.File("file"); return file != nil, err })
		try(func() (bool, error) { files, err := upg.Files(); return len(files) == 1, err })
		MustBeReady(upg)
	})
}

// A parent that is out of descriptors says so, and upgrades once it has some.
func TestDescriptorsInParent(t *testing.T) {
	for _, compat := range []bool{false, true} { // which needs another pipe
		t.Run(fmt.Sprint("compat ", compat), func(t *testing.T) { testDescriptorsInParent(t, compat) })
	}
}

func testDescriptorsInParent(t *testing.T, compat bool) {
	upg, s := NewParent(t, tableflip.Options{Compat: compat}, "list-files")
	server, _ := proctest.Connect(t)
	proctest.OK(t, upg.AddConn("tcp", "", server))
	proctest.OK(t, upg.AddFile("file", os.Stderr))
	proctest.OK(t, upg.Ready())
	var limit unix.Rlimit
	proctest.OK(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	proctest.WithoutGC(t)
	t.Cleanup(func() { unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) })
	next, unfill := fillDescriptors()
	defer unfill()
	open := func() int { return len(proctest.OpenFiles(t, os.Getpid())) }
	before := open()
	failed := 0
	for spare := range uint64(200) { // others, too, may have opened some
		unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: next + spare, Max: limit.Max})
		err := upg.Upgrade()
		unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
		if err == nil {
			break
		}
		failed++
		if !errors.Is(err, syscall.EMFILE) || !strings.Contains(err.Error(), "limit of open files") {
			t.Errorf("with room for %d descriptors: %v", spare, err)
		}
		if now := open(); now != before {
			t.Errorf("with room for %d descriptors: %d are open, and %d were before", spare, now, before)
		}
	}
	if failed < 3 {
		t.Errorf("only %d upgrades failed", failed)
	}
	if m := s.Await("files"); m.Text != `["fd:file:"]` {
		t.Errorf("the child got %s", m.Text)
	}
}
