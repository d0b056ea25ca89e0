package handovertest

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
)

// Both sides of the handover in its first version, written from what is on the wire. They
// use nothing of the package, so that later versions can be tested against this one.
//
// The child finds the write end of the ready pipe as descriptor 3, the read end of the
// verdict pipe as 4, and what is passed from 5 on. TABLEFLIP_HANDOVER says
//
//	1 READY VERDICT fds=COUNT parts=PARTS pid=PID until=MILLISECONDS offers=WORD,…
//
// where the pipes are DEVICE:INODE, and offers, which may be missing, are the words beyond
// the handover itself that the child may accept, after its PID: here PID WORD….
// TABLEFLIP_HANDOVER_0 and so on, put together, say KIND,NETWORK,ADDRESS,… for each
// descriptor, separated by semicolons. Unknown words are ignored.

// A speaker is one end of the conversation.
type speaker struct {
	hearing *bufio.Reader
	saying  *os.File
}

func (s speaker) say(line string) error {
	_, err := fmt.Fprintln(s.saying, line)
	return err
}

// hear returns the next line, or "EOF".
func (s speaker) hear() string {
	line, err := s.hearing.ReadString('\n')
	if err != nil {
		return err.Error()
	}
	return strings.TrimSuffix(line, "\n")
}

func pipeID(fd uintptr) string {
	var stat unix.Stat_t
	proctest.Must(0, unix.Fstat(int(fd), &stat))
	return fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)
}

// pidNamespace returns the number of this process's PID namespace, without which a child
// does not say its PID: the sender might know it by another.
func pidNamespace() string {
	return strings.Trim(proctest.Must(os.Readlink("/proc/self/ns/pid")), "pid:[]")
}

// startingEnvironment returns the variables that this process was started with.
func startingEnvironment() map[string]string {
	variables := map[string]string{}
	for _, variable := range bytes.Split(proctest.Must(os.ReadFile("/proc/self/environ")), []byte{0}) {
		name, value, _ := strings.Cut(string(variable), "=")
		variables[name] = value
	}
	return variables
}

// speakAsChild returns the child's end, the names of what it got, and what was offered.
func speakAsChild() (s speaker, names []string, offers string) {
	variables := startingEnvironment()
	header := strings.Fields(variables["TABLEFLIP_HANDOVER"])
	if want := []string{"1", pipeID(3), pipeID(4)}; len(header) < 3 || fmt.Sprint(header[:3]) != fmt.Sprint(want) {
		panic(fmt.Sprintf("the table begins with %q, and the pipes are %q", header, want))
	}
	words := map[string]string{}
	for _, word := range header[3:] {
		name, value, _ := strings.Cut(word, "=")
		words[name] = value
	}
	var all strings.Builder
	for part := range 100 {
		all.WriteString(variables[fmt.Sprintf("TABLEFLIP_HANDOVER_%d", part)])
	}
	names = strings.Split(all.String(), ";")
	if words["fds"] != fmt.Sprint(len(names)) || words["pid"] == "" || words["until"] == "" {
		panic(fmt.Sprintf("the table says %q and %q", words, names))
	}
	return speaker{bufio.NewReader(os.NewFile(4, "verdict")), os.NewFile(3, "ready")}, names, words["offers"]
}

// A spokenTo is a child that was started by a speaker.
type spokenTo struct {
	speaker
	cmd  *exec.Cmd
	read *os.File // what hearing reads
}

// speakBesideElder is speakToChild with generation 4 as an elder, whose process has the ID pid
// and perhaps a handle. It returns the elder's ends of its pipes.
func speakBesideElder(t *testing.T, cmd *exec.Cmd, words string, pid int, handle ...*os.File) (parent spokenTo, ready, verdict *os.File) {
	t.Helper()
	ready, readyWrite, err := os.Pipe()
	proctest.OK(t, err)
	verdictRead, verdict, err := os.Pipe()
	proctest.OK(t, err)
	t.Cleanup(func() {
		ready.Close()
		verdict.Close()
	})
	details := fmt.Sprint("4,", pid, ",", time.Now().UnixMilli())
	entries := "earlier,ready," + details + ";earlier,verdict," + details
	if len(handle) > 0 {
		entries += ";earlier,process," + details
	}
	parent = speakToChild(t, cmd, words, entries, append([]*os.File{readyWrite, verdictRead}, handle...)...)
	readyWrite.Close()
	verdictRead.Close()
	return parent, ready, verdict
}

// speakToChild starts cmd with files, whose names are those of entries. Words are added
// to the header.
func speakToChild(t *testing.T, cmd *exec.Cmd, words, entries string, files ...*os.File) spokenTo {
	t.Helper()
	readyRead, readyWrite, err := os.Pipe()
	proctest.OK(t, err)
	verdictRead, verdictWrite, err := os.Pipe()
	proctest.OK(t, err)
	cmd.Env = append(cmd.Env,
		fmt.Sprintf("TABLEFLIP_HANDOVER=1 %s %s fds=%d later=x,y parts=2 pid=%d new until=%d pidns=%s %s",
			pipeID(readyWrite.Fd()), pipeID(verdictRead.Fd()), len(files), os.Getpid(), time.Now().Add(time.Minute).UnixMilli(), pidNamespace(), words),
		"TABLEFLIP_HANDOVER_0="+entries[:len(entries)/2], "TABLEFLIP_HANDOVER_1="+entries[len(entries)/2:])
	cmd.ExtraFiles = append([]*os.File{readyWrite, verdictRead}, files...)
	proctest.OK(t, cmd.Start())
	readyWrite.Close()
	verdictRead.Close()
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		readyRead.Close()
		verdictWrite.Close()
	})
	return spokenTo{speaker{bufio.NewReader(readyRead), verdictWrite}, cmd, readyRead}
}

// want checks what the child says next.
func (c spokenTo) want(t *testing.T, line string) {
	t.Helper()
	if got := proctest.Within(t, line, proctest.InBackground(c.hear)); got != line {
		t.Fatalf("the child says %q, want %q", got, line)
	}
}

// sayAll says lines, which the child must have room for.
func (s speaker) sayAll(t *testing.T, lines ...string) {
	t.Helper()
	for _, line := range lines {
		proctest.OK(t, s.say(line))
	}
}

// listenerFile returns a listener's file, and its address.
func listenerFile(t *testing.T) (*os.File, string) {
	t.Helper()
	ln := proctest.Opened[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	return proctest.Opened[*os.File](t)(ln.(*net.TCPListener).File()), ln.Addr().String()
}
