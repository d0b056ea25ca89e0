//go:build unix

package control_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/control"
	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/proctest"
	stub "example.com/tableflip/testing"
)

// ctlOutput starts the command, and reads what it writes while it runs.
func (s *service) ctlOutput(arguments ...string) (*proctest.Output, *ctl) {
	s.t.Helper()
	read, write, err := os.Pipe()
	proctest.OK(s.t, err)
	defer write.Close()
	output := proctest.NewOutput(s.t)
	go output.Read(read)
	c := s.prepareCtl(arguments...)
	c.cmd.Stdout = write
	c.ended = s.Start(c.cmd)
	return output, c
}

// Events are followed from generation to generation.
func TestEvents(t *testing.T) {
	s := start(t)
	output, c := s.ctlOutput("events")
	output.Await("watching", "state=\"in charge\"", fmt.Sprint("pid=", s.current.PID))
	for range 3 {
		s.setFlaw("drain")
		s.want(s.ask(t.Context(), "POST", "/upgrade"), 200)
		old := s.adopt()
		for _, name := range []string{"started", "here", "ready", "committed"} {
			output.Await(name, fmt.Sprint("pid=", s.current.PID))
		}
		// The two processes stream side by side.
		proctest.AwaitThat(t, "both are watched", func() bool {
			return output.Count(fmt.Sprintf("watching generation=%d pid=%d", s.status().Generation, s.current.PID)) == 1 &&
				output.Count(fmt.Sprintf("draining connections=3 generation=%d pid=%d", s.status().Generation-1, old.PID)) == 1
		})
		old.Order("drained")
		output.Await("ended", fmt.Sprint("pid=", old.PID))
		old.AwaitEnd()
	}
	s.setFlaw("exit")
	s.ask(t.Context(), "POST", "/upgrade")
	s.Next()
	output.Await("failed", "exit status 7", "cause=child")
	proctest.Kill(t, c.cmd.Process.Pid, syscall.SIGINT)
	s.wantExit(c, 0)
}

// With -wait, events are waited for until a service is there.
func TestEventsNobody(t *testing.T) {
	directory := proctest.SocketDir(t)
	s := &service{proctest.NewService(t), t, directory, filepath.Join(directory, "ctl"), nil}
	s.wantExit(s.ctl("events"), 2, "nobody answers")
	output, c := s.ctlOutput("-wait", "-json", "events")
	s.Start(s.Command("serve", s.Wire(), proctest.WithArg(directory)))
	s.adopt()
	line := output.Await("watching")
	var watching struct {
		Event string
		PID   int
	}
	if err := json.Unmarshal([]byte(line), &watching); err != nil || watching.Event != "watching" || watching.PID != s.current.PID {
		t.Errorf("got %s, %v", line, err)
	}
	s.ask(t.Context(), "POST", "/stop")
	s.current.AwaitEnd()
	s.Start(s.Command("serve", s.Wire(), proctest.WithArg(directory)))
	s.adopt()
	output.Await("watching", strconv.Itoa(s.current.PID))
	proctest.Kill(t, c.cmd.Process.Pid, syscall.SIGTERM)
	s.wantExit(c, 0)
}

// A process that was just replaced may accept once more, and is not watched twice.
func TestEventsAvoidTheReplaced(t *testing.T) {
	s := &service{Service: proctest.NewService(t), t: t, socket: filepath.Join(proctest.SocketDir(t), "ctl")}
	ln := proctest.Opened[net.Listener](t)(net.Listen("unix", s.socket))
	const line = `{"time":"2026-01-02T03:04:05Z","event":%q,"pid":%d}` + "\n"
	streams := make(chan string, 3)
	streams <- fmt.Sprintf(line+line, "watching", 4000001, "committed", 4000002)
	streams <- fmt.Sprintf(line, "watching", 4000001)
	streams <- fmt.Sprintf(line+line, "watching", 4000002, "last", 4000002)
	left := make(chan string, 3)
	go http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		stream := <-streams
		io.WriteString(w, stream)
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
		left <- stream
	}))
	output, c := s.ctlOutput("events")
	output.Await("last")
	if got, want := proctest.Within(t, "the end of a stream", left), fmt.Sprintf(line, "watching", 4000001); got != want {
		t.Errorf("the command follows no more than %q, want it of %q", got, want)
	}
	for text, want := range map[string]int{"watching pid=4000001": 1, "committed pid=4000002": 1, "watching pid=4000002": 1} {
		if got := output.Count(text); got != want {
			t.Errorf("%d lines with %q, want %d", got, text, want)
		}
	}
	proctest.Kill(t, c.cmd.Process.Pid, syscall.SIGINT)
	s.wantExit(c, 0)
}

// inProcess serves an Upgrader that never upgrades.
func inProcess(t *testing.T) (ctl *control.Server, socket string) {
	socket = filepath.Join(proctest.SocketDir(t), "ctl")
	upg, _ := stub.New()
	ctl, err := control.New(upg, socket, control.Options{})
	proctest.OK(t, err)
	go ctl.Serve()
	t.Cleanup(ctl.Close)
	return ctl, socket
}

func watch(t *testing.T, socket string) *bufio.Scanner {
	t.Helper()
	conn := proctest.Opened[net.Conn](t)(net.Dial("unix", socket))
	io.WriteString(conn, "GET /events HTTP/1.0\r\n\r\n")
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, 1<<20)
	want(t, lines, "watching")
	return lines
}

// want skips lines until one that has text.
func want(t *testing.T, lines *bufio.Scanner, text string) {
	t.Helper()
	for lines.Scan() {
		if strings.Contains(lines.Text(), text) {
			return
		}
	}
	t.Errorf("the stream has ended before %q: %v", text, lines.Err())
}

// Readers that do not read hold up neither who publishes, nor other readers, nor Close;
// and more of them than there is room for leave room for those who ask.
func TestEventsStuck(t *testing.T) {
	t.Cleanup(control.SetPatience(shortPatience))
	ctl, socket := inProcess(t)
	for range 31 {
		watch(t, socket)
	}
	reader := watch(t, socket)
	conn := proctest.Opened[net.Conn](t)(net.Dial("unix", socket))
	io.WriteString(conn, "GET /events HTTP/1.0\r\n\r\n")
	if got := proctest.Answers(t, []net.Conn{conn})[0]; !strings.Contains(got, "503 Service Unavailable") {
		t.Errorf("one reader too many was answered %q", got)
	}

	long := strings.Repeat("x", 1<<16)
	for i := range 30 {
		event.Publish(nil, slog.LevelInfo, "test", slog.String("long", long), slog.Int("number", i))
		want(t, reader, fmt.Sprint("number=", i))
	}
	closed := proctest.InBackground(func() bool { ctl.Close(); return true })
	proctest.Within(t, "Close", closed)
}

// What was published before is counted.
func TestCountersAreCurrent(t *testing.T) {
	ctl, _ := inProcess(t)
	for i := range 1000 {
		event.Publish(nil, slog.LevelError, event.Failed, slog.String("cause", "test"))
		if got := ctl.Counters().Failures["test"]; got != i+1 {
			t.Fatalf("%d of %d are counted", got, i+1)
		}
	}
	event.Publish(nil, slog.LevelInfo, event.Ended) // of a successor
	for _, generation := range []int{0, 2} {        // the stub is 1; one on trial would be 2
		event.Publish(nil, slog.LevelInfo, event.Ended, slog.Int("generation", generation), slog.Duration("took", 1500*time.Millisecond))
	}
	ctl.Close()
	if got := ctl.Counters(); got.Failures["test"] != 1000 || got.Drains != 1 || got.DrainSeconds != 1.5 {
		t.Errorf("after Close, there are %+v", got)
	}
}

// The last events before the end arrive.
func TestEventsEnd(t *testing.T) {
	ctl, socket := inProcess(t)
	lines := watch(t, socket)
	for i := range 10 {
		event.Publish(nil, slog.LevelInfo, "test", slog.Int("number", i))
	}
	ctl.Close()
	want(t, lines, "number=9")
	if lines.Scan() {
		t.Errorf("more came: %q", lines.Text())
	}
}
