//go:build unix

package handovertest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// These tests are about the name table on its way to the child.

// In a child whose environment was garbled New must fail each time: a process
// that took itself for a first generation would bind what its parent has.
func TestTableGarbled(t *testing.T) {
	for _, test := range []struct {
		story, script string
		want          []string
	}{
		{"garbage", `TABLEFLIP_HANDOVER=garbage exec "$0"`, []string{"TABLEFLIP_HANDOVER", "garbled"}},
		{"garbage without pipes", `TABLEFLIP_HANDOVER=garbage exec "$0" 3>&- 4>&-`, []string{"TABLEFLIP_HANDOVER", "garbled"}},
		{"empty", `TABLEFLIP_HANDOVER= exec "$0"`, []string{"TABLEFLIP_HANDOVER", "garbled"}},
		{"header missing", `unset TABLEFLIP_HANDOVER; exec "$0"`, []string{"TABLEFLIP_HANDOVER", "garbled"}},
		{"names missing", `unset TABLEFLIP_HANDOVER_0; exec "$0"`, []string{"TABLEFLIP_HANDOVER_0", "missing"}},
		{"names cut", `TABLEFLIP_HANDOVER_0=${TABLEFLIP_HANDOVER_0%;*} exec "$0"`, []string{"4 descriptors announced, 3 found"}},
		// So many that they are not all taken by what the runtime opens.
		{"descriptors missing", `set -- "$0" $TABLEFLIP_HANDOVER
			for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do more="$more;fd,missing"; done
			TABLEFLIP_HANDOVER="$2 $3 $4 fds=24 parts=1 pid=1 until=2" TABLEFLIP_HANDOVER_0="$TABLEFLIP_HANDOVER_0$more" exec "$0"`,
			[]string{"inherit descriptor", `"fd:missing:"`}},
		{"newer version", `TABLEFLIP_HANDOVER="27${TABLEFLIP_HANDOVER#1}" exec "$0"`, []string{`"27"`, `"1"`}},
		{"newer version with more fields", `TABLEFLIP_HANDOVER="27${TABLEFLIP_HANDOVER#1} and more" exec "$0"`, []string{`"27"`, `"1"`}},
	} {
		t.Run(test.story, func(t *testing.T) {
			upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(test.script)}, "new-twice")
			for _, fileName := range []string{"first", "second", "third"} {
				proctest.OK(t, upg.AddFile(fileName, os.Stderr))
			}
			proctest.OK(t, upg.Ready())
			var exit *exec.ExitError
			if err := upg.Upgrade(); !errors.As(err, &exit) {
				t.Errorf("Upgrade: %v", err)
			}
			first, second := s.Await("new").Text, s.Await("new").Text
			for _, want := range append(test.want, "tableflip: ") {
				if !strings.Contains(first, want) {
					t.Errorf("New: %q lacks %q", first, want)
				}
			}
			if second != first {
				t.Errorf("the second New: %s\nwant what the first said: %s", second, first)
			}
			if environment := s.Await("environment").Text; environment != "[]" {
				t.Errorf("left in the environment: %s", environment)
			}
		})
	}
}

func init() {
	proctest.Role("new-twice", func() {
		for range 2 {
			_, err := tableflip.New(tableflip.Options{})
			proctest.Report("new", err)
		}
		proctest.Report("environment", Variables())
		os.Exit(1)
	})
}

var oddNames = []string{
	"", " ", "a b", ":", "fd:a:", "a:b:c", "\n", "a\nb\r", "\x00", "a\x00b", "\xff\xfe", "é\xc3", ",", ";", "%2C", "+", "=", "\t",
	"/", "..", "TABLEFLIP_HANDOVER=1", strings.Repeat("long", 1000),
}

func TestTableNames(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "odd-names")
	file := proctest.Opened[*os.File](t)(os.Create(filepath.Join(t.TempDir(), "file")))
	server, client := proctest.Connect(t)
	for i, odd := range oddNames {
		proctest.Must(fmt.Fprintf(file, "%d\n", i))
		read := proctest.Opened[*os.File](t)(os.Open(file.Name()))
		proctest.Must(read.Seek(int64(i), io.SeekStart))
		proctest.OK(t, upg.AddFile(odd, read))
		proctest.OK(t, upg.AddConn(odd, oddNames[len(oddNames)-1-i], server))
	}
	Upgrade(t, upg)
	proctest.WantOpen(t, "connections", client, server)
	if m := s.Await("odd"); m.Text != "<nil>" {
		t.Error(m.Text)
	}
}

func init() {
	proctest.Role("odd-names", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		var errs []error
		for i, odd := range oddNames {
			conn, err := upg.Conn(odd, oddNames[len(oddNames)-1-i])
			if conn == nil {
				errs = append(errs, fmt.Errorf("connection %q: %w", odd, err))
			}
			file, err := upg.File(odd)
			if file == nil {
				errs = append(errs, fmt.Errorf("file %q: %w", odd, err))
				continue
			}
			if at := proctest.Must(file.Seek(0, io.SeekCurrent)); at != int64(i) {
				errs = append(errs, fmt.Errorf("file %q is the one of number %d", odd, at))
			}
			if want := "fd:" + odd + ":"; file.Name() != want {
				errs = append(errs, fmt.Errorf("file %q has the name %q", odd, file.Name()))
			}
		}
		MustBeReady(upg)
		proctest.Report("odd", errors.Join(errs...))
	})
}

// Linux takes no environment string longer than 128 KiB. How the table is spread is
// internal/nametable's.
func TestTableLarge(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "list-files")
	var want []string
	for i := range 12 {
		fileName := fmt.Sprint(10+i, strings.Repeat("x", 50_000))
		proctest.OK(t, upg.AddFile(fileName, os.Stderr))
		want = append(want, "fd:"+fileName+":")
	}
	Upgrade(t, upg)
	if got := s.Await("files").Text; got != fmt.Sprintf("%q", want) {
		t.Errorf("the child got %d bytes of names, want %d", len(got), len(fmt.Sprintf("%q", want)))
	}
}

func TestTableTooLarge(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "list-files")
	proctest.OK(t, upg.AddFile(strings.Repeat("x", 8<<20), os.Stderr))
	proctest.OK(t, upg.AddFile("small", os.Stderr))
	proctest.OK(t, upg.Ready())
	err := upg.Upgrade()
	proctest.WantError(t, "Upgrade", err, syscall.E2BIG)
	if err != nil && !strings.Contains(err.Error(), "shorter names") {
		t.Errorf("%.300q does not say what to do", err)
	}
	proctest.OK(t, upg.RemoveFile(strings.Repeat("x", 8<<20)))
	proctest.OK(t, upg.Upgrade())
	if got := s.Await("files").Text; got != `["fd:small:"]` {
		t.Errorf("the child got %.100s", got)
	}
}

func TestTableManyFiles(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "list-files")
	var want []string
	for i := range 300 {
		fileName := strconv.Itoa(1000 + i)
		proctest.OK(t, upg.AddFile(fileName, os.Stderr))
		want = append(want, "fd:"+fileName+":")
	}
	Upgrade(t, upg)
	if got := s.Await("files").Text; got != fmt.Sprintf("%q", want) {
		t.Errorf("the child got %s", got)
	}
}

func init() {
	proctest.Role("list-files", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		var names []string
		for _, file := range proctest.Must(upg.Files()) {
			names = append(names, file.Name())
		}
		MustBeReady(upg)
		slices.Sort(names)
		proctest.Report("files", fmt.Sprintf("%q", names))
	})
}

const manyListeners = 4000

// manyName is the address by which the test knows a listener. It is long, so that
// the name table is longer than the longest variable that Linux passes on.
func manyName(i int) string {
	return fmt.Sprintf("%060d", i)
}

func init() {
	// many claims all listeners, and answers on each with its number.
	proctest.Role("many", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		for i := range manyListeners {
			ln := proctest.Must(upg.Listener("unix", manyName(i)))
			if ln == nil {
				panic(fmt.Sprint("no listener ", i))
			}
			go func() {
				for {
					conn := proctest.Must(ln.Accept())
					fmt.Fprint(conn, i)
					conn.Close()
				}
			}()
		}
		MustBeReady(upg)
		proctest.Report("ready")
		select {}
	})
}

func TestTableManyListeners(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "many")
	// The child holds each twice: its own and the registry's.
	const need = 2*manyListeners + 200
	var limit syscall.Rlimit
	proctest.OK(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	if limit.Max < need {
		t.Skipf("needs %d descriptors, and the hard limit (ulimit -Hn) is %d", need, limit.Max)
	}
	if size := manyListeners * len(manyName(0)); size <= 128<<10 {
		t.Fatalf("the names are only %d bytes long", size)
	}

	// Not TCP, which would run out of ports if other tests do the same.
	dir := proctest.SocketDir(t)
	path := func(i int) string { return filepath.Join(dir, strconv.Itoa(i)) }
	for i := range manyListeners {
		ln, err := net.Listen("unix", path(i))
		proctest.OK(t, err)
		proctest.OK(t, upg.AddListener("unix", manyName(i), ln.(tableflip.Listener)))
		ln.Close()
	}
	Upgrade(t, upg)
	s.Await("ready")
	for i := 0; i < manyListeners; i += 93 {
		conn, err := net.DialTimeout("unix", path(i), proctest.Patience)
		proctest.OK(t, err)
		conn.SetDeadline(time.Now().Add(proctest.Patience))
		if answer, err := io.ReadAll(conn); err != nil || string(answer) != strconv.Itoa(i) {
			t.Errorf("listener %d answered %q, %v", i, answer, err)
		}
		conn.Close()
	}
}

// A disguised file calls itself something else.
type disguisedFile struct {
	net.Listener
	net.Conn
	file *os.File
}

func (d disguisedFile) SyscallConn() (syscall.RawConn, error) { return d.file.SyscallConn() }

func (d disguisedFile) Close() error { return nil }

func (d disguisedFile) Addr() net.Addr { return nil }

func (d disguisedFile) LocalAddr() net.Addr { return nil }

type disguisedPacketConn struct {
	net.PacketConn
	file *os.File
}

func (d disguisedPacketConn) SyscallConn() (syscall.RawConn, error) { return d.file.SyscallConn() }

func (d disguisedPacketConn) LocalAddr() net.Addr { return nil }

// A new process could open none of these as what they are called.
func TestTableWrongTypes(t *testing.T) {
	upg := NewUpgrader(t, tableflip.Options{})
	file := proctest.Opened[*os.File](t)(os.Open(os.Args[0]))
	for what, err := range map[string]error{
		"listener":    upg.AddListener("tcp", "a", disguisedFile{file: file}),
		"connection":  upg.AddConn("tcp", "a", disguisedFile{file: file}),
		"packet conn": upg.AddPacketConn("udp", "a", disguisedPacketConn{file: file}),
	} {
		if err == nil || !strings.Contains(err.Error(), "makes no "+what) || !strings.Contains(err.Error(), "AddFile") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
