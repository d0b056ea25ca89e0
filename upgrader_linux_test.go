package tableflip_test

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
)

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
	roles["subprocess"] = func() {
		descriptors, variables := foreignDescriptors(), handoverVariables()
		upg, err := tableflip.New(tableflip.Options{})
		if err != nil {
			report("subprocess", err)
			return
		}
		report("subprocess", upg.HasParent(), descriptors, variables, upg.Ready())
	}
	roles["start-subprocess"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		must(upg.Listen("tcp", "localhost:0"))
		must(upg.ListenPacket("udp", "localhost:0"))
		must(upg.File("file"))
		for _, moment := range []string{"before Ready", "after Ready"} {
			if moment == "after Ready" {
				mustBeReady(upg)
			}
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), roleVariable+"=subprocess")
			cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
			must(0, cmd.Run())
		}
	}
}

// Elsewhere a marker variable and descriptors 3 and 4 leak to the child's
// subprocesses, whose New then fails.
func TestSubprocessesOfAChildInheritNothing(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "start-subprocess")
	for _, err := range []error{
		listens(upg.Listen("tcp", "localhost:0")),
		listens(upg.ListenPacket("udp", "localhost:0")),
		upg.AddFile("file", os.Stderr),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	server, _ := connect(t)
	if err := upg.AddConn("tcp", "nobody claims it", server); err != nil {
		t.Fatal(err)
	}
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	got := []string{s.await("subprocess").text, s.await("subprocess").text}

	// The runtime opens files, and this test may have inherited some itself.
	control := s.command("subprocess")
	if err := control.Run(); err != nil {
		t.Fatal(err)
	}
	want := s.await("subprocess").text
	for i, moment := range []string{"before Ready", "after Ready"} {
		if got[i] != want {
			t.Errorf("%s, HasParent, descriptors, variables and Ready of a subprocess: %s, want %s", moment, got[i], want)
		}
	}
	if !strings.HasPrefix(want, "false [") || !strings.HasSuffix(want, "] [] <nil>") {
		t.Errorf("and of a process that none is the parent of: %s", want)
	}
}

func init() {
	// leak hands its variables on to a process that is not of its service. It
	// finds two pipes as 3 and 4 all the same.
	roles["leak"] = func() {
		variables := handoverVariables()
		upg := must(tableflip.New(tableflip.Options{}))
		mustBeReady(upg)
		for _, descriptors := range []string{"none", "pipes", "files"} {
			for _, version := range []string{"1", "2"} {
				cmd := exec.Command(os.Args[0])
				cmd.Env = os.Environ()
				for _, variable := range variables {
					if header, ok := strings.CutPrefix(variable, "TABLEFLIP_HANDOVER=1 "); ok {
						variable = "TABLEFLIP_HANDOVER=" + version + " " + header
					}
					cmd.Env = append(cmd.Env, variable)
				}
				cmd.Env = append(cmd.Env, roleVariable+"=leaked-to", withArg(descriptors))
				cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
				switch descriptors {
				case "pipes":
					var text *os.File
					for range 2 {
						read, write, err := os.Pipe()
						must(0, err)
						must(write.WriteString("text"))
						write.Close()
						text = read
						cmd.ExtraFiles = append(cmd.ExtraFiles, text)
					}
				case "files":
					cmd.ExtraFiles = []*os.File{os.Stderr, os.Stderr}
				}
				report("leaks", descriptors, version)
				must(0, cmd.Run())
			}
		}
	}
	roles["leaked-to"] = func() {
		upg, err := tableflip.New(tableflip.Options{})
		if err != nil {
			report("leaked-to", err)
			return
		}
		text := ""
		if arg() == "pipes" {
			for _, fd := range []uintptr{3, 4} {
				text += string(must(io.ReadAll(os.NewFile(fd, ""))))
			}
		}
		report("leaked-to", upg.HasParent(), handoverVariables(), upg.Ready(), text)
	}
}

func TestLeakedEnvironmentMakesAFirstGeneration(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "leak")
	if err := upg.AddFile("file", os.Stderr); err != nil {
		t.Fatal(err)
	}
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	for range 6 {
		leak, m := s.await("leaks"), s.await("leaked-to")
		want := "false [] <nil> "
		if strings.HasPrefix(leak.text, "pipes") {
			want += "texttext"
		}
		if m.text != want {
			t.Errorf("with 3 and 4 being %s: %q, want %q", leak.text, m.text, want)
		}
	}
}

// fillDescriptors opens descriptors until all below next are in use.
func fillDescriptors() (next uint64, unfill func()) {
	var filling []int
	for next < uint64(openDescriptors()) {
		fd := must(unix.Dup(0))
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
func TestChildOutOfDescriptorsLosesNothing(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "out-of-descriptors")
	for _, err := range []error{
		listens(upg.Listen("tcp", "localhost:0")),
		listens(upg.ListenPacket("udp", "localhost:0")),
		upg.AddFile("file", os.Stderr),
		upg.AddFile("file 2", os.Stderr),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	server, _ := connect(t)
	if err := upg.AddConn("tcp", "", server); err != nil {
		t.Fatal(err)
	}
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if m := s.await("claimed"); !strings.HasPrefix(m.text, "true <nil> true ") {
			t.Errorf("EMFILE at first, then no error and a result: %s", m.text)
		}
	}
}

func init() {
	roles["out-of-descriptors"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		var limit unix.Rlimit
		must(0, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
		try := func(claim func() (bool, error)) {
			next, unfill := fillDescriptors()
			unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: next, Max: limit.Max})
			_, limited := claim()
			unfill()
			unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
			ok, err := claim()
			report("claimed", errors.Is(limited, syscall.EMFILE), err, ok, limited)
		}
		try(func() (bool, error) { ln, err := upg.Listener("tcp", "localhost:0"); return ln != nil, err })
		try(func() (bool, error) { conn, err := upg.PacketConn("udp", "localhost:0"); return conn != nil, err })
		try(func() (bool, error) { conn, err := upg.Conn("tcp", ""); return conn != nil, err })
		try(func() (bool, error) { file, err := upg.File("file"); return file != nil, err })
		try(func() (bool, error) { files, err := upg.Files(); return len(files) == 1, err })
		mustBeReady(upg)
	}
}

// A parent that is out of descriptors says so, and upgrades once it has some.
func TestParentOutOfDescriptorsStaysInCharge(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "list-files")
	server, _ := connect(t)
	if err := upg.AddConn("tcp", "", server); err != nil {
		t.Fatal(err)
	}
	if err := upg.AddFile("file", os.Stderr); err != nil {
		t.Fatal(err)
	}
	ready(t, upg)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	withoutGC(t)
	t.Cleanup(func() { unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) })
	next, unfill := fillDescriptors()
	defer unfill()
	before := openDescriptors()
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
		if now := openDescriptors(); now != before {
			t.Errorf("with room for %d descriptors: %d are open, and %d were before", spare, now, before)
		}
	}
	if failed < 3 {
		t.Errorf("only %d upgrades failed", failed)
	}
	if m := s.await("files"); m.text != `["fd:file:"]` {
		t.Errorf("the child got %s", m.text)
	}
}
