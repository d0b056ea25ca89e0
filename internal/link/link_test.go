//go:build unix

package link_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/link"
	"example.com/tableflip/internal/proctest"
)

// Links within one process, whose peers may be anything.

// A table is the registry of a generation that is not there.
type table struct {
	file  *os.File            // of the parent's point, or this generation's
	older map[string]*os.File // of the others
}

func (r *table) File(name string) (*os.File, error) {
	file := r.file
	if strings.HasPrefix(name, "talk.") {
		file = r.older[name]
	}
	if file == nil {
		return nil, nil
	}
	fd, err := descriptor.DuplicateOf(file)
	return os.NewFile(fd, "fd:"), err
}

func (r *table) RemoveFile(name string) error {
	err := r.older[name].Close()
	delete(r.older, name)
	return err
}

func (r *table) AddFile(name string, file *os.File) error {
	err := descriptor.Control(file, func(fd uintptr) error {
		if closes, err := descriptor.IsCloseOnExec(fd); !closes {
			return fmt.Errorf("any process would inherit %d, %v", fd, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	fd, err := descriptor.DuplicateOf(file)
	if err != nil {
		return err
	}
	added := os.NewFile(fd, "fd:")
	if strings.HasPrefix(name, "talk.") {
		if r.older == nil {
			r.older = map[string]*os.File{}
		}
		r.older[name].Close() // none is an error that does not matter
		r.older[name] = added
		return nil
	}
	if r.file != nil {
		r.file.Close()
	}
	r.file = added
	return nil
}

func (r *table) close() {
	r.file.Close()
	for _, file := range r.older {
		file.Close()
	}
}

// join joins as the next generation of r.
func join(t testing.TB, r *table) *link.Meeting {
	t.Helper()
	m := proctest.Opened[*link.Meeting](t)(link.Join(r, "talk"))
	t.Cleanup(r.close)
	return m
}

func accept(t testing.TB, m *link.Meeting) *link.Link {
	t.Helper()
	return proctest.Opened[*link.Link](t)(m.Accept(patience(t)))
}

// meet returns both ends of a link.
func meet(t testing.TB) (parent, child *link.Link) {
	t.Helper()
	r := new(table)
	older := join(t, r)
	child = join(t, r).Older()[0]
	return accept(t, older), child
}

// meetStranger returns a link to what only the test has in its hand.
func meetStranger(t testing.TB) (l *link.Link, peer int) {
	t.Helper()
	r := new(table)
	m := join(t, r)
	ours, theirs := sockets(t)
	proctest.OK(t, unix.SetNonblock(theirs, true))
	write(t, r.file, "c", theirs)
	unix.Close(theirs)
	return accept(t, m), ours
}

// sockets returns a pair, of which the caller closes the second one.
func sockets(t testing.TB) (ours, theirs int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	proctest.OK(t, err)
	t.Cleanup(func() { unix.Close(fds[0]) })
	return fds[0], fds[1]
}

// write writes to a link or a point what may not belong there.
func write(t testing.TB, to syscall.Conn, text string, fds ...int) {
	t.Helper()
	proctest.OK(t, descriptor.Control(to, func(fd uintptr) error { return writeFD(int(fd), text, fds...) }))
}

func writeFD(fd int, text string, fds ...int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	return unix.Sendmsg(fd, []byte(text), rights, nil, 0)
}

func patience(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), proctest.Patience)
	t.Cleanup(cancel)
	return ctx
}

// header is the beginning of a message.
func header(length, descriptors int) string {
	return string(append(binary.BigEndian.AppendUint32(nil, uint32(length)), byte(descriptors)))
}

func wantMessage(t testing.TB, l *link.Link, want string) []*os.File {
	t.Helper()
	got, files, err := l.Receive(patience(t))
	if err != nil || string(got) != want {
		t.Fatalf("received %.100q, %v, want %.100q", got, err, want)
	}
	return files
}

func wantReceiveError(t testing.TB, l *link.Link, want error) {
	t.Helper()
	got, _, err := l.Receive(patience(t))
	if !errors.Is(err, want) {
		t.Errorf("received %.100q, %v, want the error %v", got, err, want)
	}
}

// wantSameDescriptors checks at the end of the test that it has left none open.
func wantSameDescriptors(t *testing.T) {
	t.Helper()
	proctest.WithoutGC(t)
	before := proctest.OpenDescriptors()
	t.Cleanup(func() {
		if after := proctest.OpenDescriptors(); after != before {
			t.Errorf("%d descriptors are open, and were %d", after, before)
		}
	})
}

func TestMessages(t *testing.T) {
	wantSameDescriptors(t)
	parent, child := meet(t)
	file := proctest.Opened[*os.File](t)(os.Open(os.Args[0]))
	for _, m := range []struct{ length, descriptors int }{
		{0, 0}, {1, 0}, {0, 1}, {100, 3}, {70_000, link.MaxDescriptors}, {link.MaxMessage, 0}, {link.MaxMessage, link.MaxDescriptors},
	} {
		for from, to := range map[*link.Link]*link.Link{parent: child, child: parent} {
			text := strings.Repeat("x", m.length)
			var passed []syscall.Conn
			for range m.descriptors {
				passed = append(passed, file)
			}
			sent := proctest.InBackground(func() error { return from.Send(patience(t), []byte(text), passed...) })
			files := wantMessage(t, to, text)
			proctest.OK(t, proctest.Within(t, "Send", sent))
			if len(files) != m.descriptors {
				t.Errorf("%d descriptors have arrived, want %d", len(files), m.descriptors)
			}
			for _, f := range files {
				if !os.SameFile(proctest.Must(f.Stat()), proctest.Must(file.Stat())) {
					t.Error("another file has arrived")
				}
				f.Close()
			}
		}
	}
	if err := parent.Send(t.Context(), make([]byte, link.MaxMessage+1)); err == nil {
		t.Error("a message that is too long was sent")
	}
	if err := parent.Send(t.Context(), nil, make([]syscall.Conn, link.MaxDescriptors+1)...); err == nil {
		t.Error("a message with too many descriptors was sent")
	}
	if err := parent.Send(t.Context(), nil, file, proctest.ClosedFile()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a closed file was sent: %v", err)
	}
	proctest.OK(t, parent.Send(t.Context(), []byte("last")))
	wantMessage(t, child, "last")
}

// What was said before the end is received, whatever the other side has not read.
func TestEnd(t *testing.T) {
	parent, child := meet(t)
	for _, text := range []string{"one", "two"} {
		proctest.OK(t, child.Send(t.Context(), []byte(text)))
		proctest.OK(t, parent.Send(t.Context(), []byte(text)))
	}
	child.Close()
	wantMessage(t, parent, "one")
	wantMessage(t, parent, "two")
	wantReceiveError(t, parent, io.EOF)
	proctest.WantError(t, "Send", parent.Send(t.Context(), nil), io.EOF)
	wantReceiveError(t, child, os.ErrClosed)
	proctest.WantError(t, "Send", child.Send(t.Context(), nil), os.ErrClosed)
}

func TestCloseExec(t *testing.T) {
	before := map[int]bool{}
	for fd := range 1024 {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		before[fd] = err == nil
	}
	parent, child := meet(t)
	file := proctest.Opened[*os.File](t)(os.Open(os.DevNull))
	proctest.OK(t, parent.Send(t.Context(), nil, file))
	received := wantMessage(t, child, "")
	defer received[0].Close()
	opened := 0
	for fd := range 1024 {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || before[fd] {
			continue
		}
		opened++
		if flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %d would be inherited", fd)
		}
	}
	if opened < 6 { // two points, a point's other end, two ends of a link, two files
		t.Errorf("%d descriptors were opened", opened)
	}
}

// A process that starts meanwhile, which holds the lock, must not get a descriptor
// before it has close-on-exec.
func TestForkLock(t *testing.T) {
	parent, child := meet(t)
	proctest.OK(t, parent.Send(t.Context(), nil, os.Stderr))
	syscall.ForkLock.Lock()
	received := proctest.InBackground(func() []*os.File {
		_, files, _ := child.Receive(patience(t))
		return files
	})
	met := proctest.InBackground(func() error {
		m, err := link.Join(new(table), "talk")
		if err == nil {
			m.Close()
		}
		return err
	})
	// Without the lock both would be done by then, unless the machine is busy.
	var early string
	select {
	case <-received:
		early = "a descriptor was received during a fork"
	case <-met:
		early = "a pair was made during a fork"
	case <-time.After(20 * time.Millisecond):
	}
	syscall.ForkLock.Unlock()
	if early != "" {
		t.Fatal(early)
	}
	closeFiles(proctest.Within(t, "Receive", received))
	proctest.OK(t, proctest.Within(t, "Join", met))
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// Nothing gets the number of a standard stream that the program has closed.
func TestStreams(t *testing.T) {
	for _, stream := range []int{0, 2} {
		restore := closeStream(t, stream)
		parent, child := meet(t)
		proctest.OK(t, parent.Send(t.Context(), nil, os.Stdout))
		closeFiles(wantMessage(t, child, ""))
		if _, err := unix.FcntlInt(uintptr(stream), unix.F_GETFD, 0); err == nil {
			t.Errorf("descriptor %d is open", stream)
		}
		restore()
	}
}

// closeStream closes a standard stream.
func closeStream(t *testing.T, stream int) (restore func()) {
	t.Helper()
	dup := proctest.Must(unix.FcntlInt(uintptr(stream), unix.F_DUPFD_CLOEXEC, 3))
	proctest.OK(t, unix.Close(stream))
	return func() {
		t.Helper()
		unix.Close(stream)
		if fd, err := unix.FcntlInt(uintptr(dup), unix.F_DUPFD, stream); fd != stream {
			t.Errorf("stream %d is %d, %v", stream, fd, err)
		}
		unix.Close(dup)
	}
}

func TestGarbage(t *testing.T) {
	tests := []struct {
		name        string
		text        string
		descriptors int
		want        error
		text2       string // of the error
	}{
		{"nothing", "", 0, io.EOF, ""},
		{"half a header", header(0, 0)[:4], 0, io.ErrUnexpectedEOF, ""},
		{"half a header with a descriptor", header(0, 1)[:1], 1, io.ErrUnexpectedEOF, ""},
		{"half a message", header(10, 0) + "12345", 0, io.ErrUnexpectedEOF, ""},
		{"a header alone", header(10, 1), 1, io.ErrUnexpectedEOF, ""},
		{"much too long", header(1<<32-1, 0), 0, nil, "length"},
		{"too long", header(link.MaxMessage+1, 0), 0, nil, "length"},
		{"a descriptor is missing", header(0, 2), 1, nil, "1 descriptors instead of 2"},
		{"all descriptors are missing", header(2, 255) + "ab", 0, nil, "0 descriptors instead of 255"},
		{"a descriptor too many", header(2, 0) + "ab", 1, nil, "1 descriptors instead of 0"},
		{"many descriptors too many", header(2, 0) + "ab", link.MaxDescriptors + 1, nil, "lost"},
		{"as many as announced", header(2, 200) + "ab", 200, nil, "lost"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			wantSameDescriptors(t)
			l, peer := meetStranger(t)
			if tt.text != "" {
				passed := make([]int, tt.descriptors) // standard input
				proctest.OK(t, writeFD(peer, tt.text, passed...))
			}
			proctest.OK(t, unix.Shutdown(peer, unix.SHUT_WR))
			for range 2 { // the second time, it has not changed
				got, _, err := l.Receive(patience(t))
				if err == nil || tt.want != nil && err != tt.want || !strings.Contains(err.Error(), tt.text2) {
					t.Errorf("received %q, %v, want an error, %v %s", got, err, tt.want, tt.text2)
				}
			}
			if tt.want != nil {
				return
			}
			if n, err := unix.Read(peer, make([]byte, 1)); n > 0 || err != nil && err != unix.ECONNRESET {
				t.Errorf("after garbage, the peer has read %d, %v, want the end", n, err)
			}
		})
	}
}

// A peer that sends descriptors with every byte cannot have this process keep them all.
func TestTooManyDescriptors(t *testing.T) {
	wantSameDescriptors(t)
	l, peer := meetStranger(t)
	proctest.OK(t, writeFD(peer, header(1000, 0)))
	for range 50 {
		proctest.OK(t, writeFD(peer, "x", 0))
	}
	if _, _, err := l.Receive(patience(t)); err == nil || !strings.Contains(err.Error(), "lost") {
		t.Errorf("received, %v", err)
	}
}

// A point that has received garbage takes the next claim all the same.
func TestGarbageAtPoint(t *testing.T) {
	wantSameDescriptors(t)
	r := new(table)
	m := join(t, r)
	blocking, blockingPeer := sockets(t)
	defer unix.Close(blockingPeer)
	write(t, r.file, strings.Repeat("GET / HTTP/1.0\r\n", 100))
	one, two := sockets(t)
	defer unix.Close(two)
	proctest.OK(t, unix.SetNonblock(one, true))
	write(t, r.file, "c", one, two)
	write(t, r.file, "c", make([]int, link.MaxDescriptors+1)...)
	file := proctest.Opened[*os.File](t)(os.Open(os.Args[0]))
	write(t, r.file, "c", int(file.Fd()))
	write(t, r.file, "c", blocking)
	child := join(t, r).Older()[0]
	l := accept(t, m)
	proctest.OK(t, l.Send(t.Context(), []byte("hello")))
	wantMessage(t, child, "hello")
}

// A claim that brings no socket makes a link that says so.
func TestPipeAtPoint(t *testing.T) {
	wantSameDescriptors(t)
	r := new(table)
	m := join(t, r)
	pipe := make([]int, 2)
	proctest.OK(t, unix.Pipe(pipe))
	proctest.OK(t, unix.SetNonblock(pipe[0], true))
	write(t, r.file, "c", pipe[0])
	unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	wantReceiveError(t, accept(t, m), unix.ENOTSOCK)
}

func TestReceiveGoesOn(t *testing.T) {
	wantSameDescriptors(t)
	l, peer := meetStranger(t)
	text := header(6, 2) + "abcdef"
	for i := range len(text) {
		if i == 0 {
			proctest.OK(t, writeFD(peer, text[:1], 0, 0))
		} else {
			proctest.OK(t, writeFD(peer, text[i:i+1]))
		}
		if i == len(text)-1 {
			break
		}
		// It ends by its deadline, having read what there is.
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		wantDeadline(t, l, ctx)
		cancel()
	}
	files := wantMessage(t, l, "abcdef")
	if len(files) != 2 {
		t.Errorf("%d descriptors have arrived", len(files))
	}
	closeFiles(files)
}

// A context that ends while its Receive returns does not end the next one.
func TestReceiveEndsLate(t *testing.T) {
	// What interrupts a Receive is a goroutine, which cannot run before this one waits.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	parent, child := meet(t)
	for i := range 100 {
		want := strconv.Itoa(i)
		proctest.OK(t, parent.Send(t.Context(), []byte(want)))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		got, _, err := child.Receive(&endsLate{Context: ctx})
		if err != nil && err != context.Canceled || err == nil && string(got) != want {
			t.Fatalf("received %q, %v, want %q", got, err, want)
		}
		if err == nil {
			runtime.Gosched()
			proctest.OK(t, parent.Send(t.Context(), []byte(want)))
		}
		wantMessage(t, child, want)
	}
}

// An endsLate is a context that ends after it was asked once whether it has.
type endsLate struct {
	context.Context
	askedDone, askedErr bool
}

func (c *endsLate) Done() <-chan struct{} {
	if !c.askedDone {
		c.askedDone = true
		return make(chan struct{})
	}
	return c.Context.Done()
}

func (c *endsLate) Err() error {
	if !c.askedErr {
		c.askedErr = true
		return nil
	}
	return c.Context.Err()
}

func wantDeadline(t testing.TB, l *link.Link, ctx context.Context) {
	t.Helper()
	if got, _, err := l.Receive(ctx); err != context.DeadlineExceeded {
		t.Errorf("received %q, %v, want %v", got, err, context.DeadlineExceeded)
	}
}

// Whoever does not read holds nobody up, and what was sent in part is not taken for a
// message.
func TestSendToStuck(t *testing.T) {
	l, peer := meetStranger(t)
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	sent := proctest.InBackground(func() error { return l.Send(ctx, make([]byte, link.MaxMessage)) })
	awaitReadable(t, peer)
	cancel(cause)
	proctest.WantError(t, "Send", proctest.Within(t, "Send", sent), cause)
	if err := l.Send(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "in part") {
		t.Errorf("after a message in part, Send returned %v", err)
	}
	proctest.OK(t, unix.SetNonblock(peer, true))
	got := proctest.Must(io.ReadAll(proctest.Opened[*os.File](t)(os.NewFile(uintptr(proctest.Must(unix.Dup(peer))), "peer"), nil)))
	if len(got) >= link.MaxMessage {
		t.Errorf("%d bytes have arrived, which is all", len(got))
	}
}

// What a process said before it died is received, also if it died while it was told
// something.
func TestSendToDying(t *testing.T) {
	l, peer := meetStranger(t)
	proctest.OK(t, writeFD(peer, header(4, 0)+"last"))
	sent := proctest.InBackground(func() error { return l.Send(t.Context(), make([]byte, link.MaxMessage)) })
	awaitReadable(t, peer)
	proctest.OK(t, unix.Shutdown(peer, unix.SHUT_RDWR))
	proctest.WantError(t, "Send", proctest.Within(t, "Send", sent), io.EOF)
	wantMessage(t, l, "last")
	wantReceiveError(t, l, io.EOF)
}

// awaitReadable waits until the peer of a link has been sent something. If that is
// longer than the buffer, a Send is at work then until somebody reads.
func awaitReadable(t *testing.T, peer int) {
	t.Helper()
	proctest.AwaitThat(t, "something was sent", func() bool {
		readable, _ := descriptor.Poll(uintptr(peer))
		return readable
	})
}

// A message of which nothing was sent leaves the link as it was.
func TestSendNothing(t *testing.T) {
	parent, child := meet(t)
	proctest.OK(t, parent.Send(t.Context(), []byte("first")))
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	proctest.WantError(t, "Send", parent.Send(cancelled, []byte("never")), context.Canceled)
	proctest.OK(t, parent.Send(t.Context(), []byte("second")))
	wantMessage(t, child, "first")
	if _, _, err := child.Receive(cancelled); err != context.Canceled {
		t.Errorf("Receive returned %v", err)
	}
	wantMessage(t, child, "second")
}

// Nor does one that finds no room.
func TestSendToFull(t *testing.T) {
	l, peer := meetStranger(t)
	sent := 0
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		err := l.Send(ctx, nil)
		cancel()
		if err != nil {
			proctest.WantError(t, "Send", err, context.DeadlineExceeded)
			break
		}
		sent++
	}
	wantHeaders(t, peer, sent)
	proctest.OK(t, l.Send(t.Context(), nil))
	wantHeaders(t, peer, 1)
}

// wantHeaders reads empty messages.
func wantHeaders(t *testing.T, peer, n int) {
	t.Helper()
	for range n {
		got := make([]byte, len(header(0, 0)))
		if length := proctest.Must(unix.Read(peer, got)); string(got[:length]) != header(0, 0) {
			t.Fatalf("read %q", got[:length])
		}
	}
}

// A Send or Receive that waits for its turn obeys its context, too.
func TestTurns(t *testing.T) {
	l, peer := meetStranger(t)
	receiveCtx, cancelReceive := context.WithCancel(t.Context())
	sendCtx, cancelSend := context.WithCancel(t.Context())
	defer cancelSend()
	received := proctest.InBackground(func() error {
		_, _, err := l.Receive(receiveCtx)
		return err
	})
	sent := proctest.InBackground(func() error { return l.Send(sendCtx, make([]byte, link.MaxMessage)) })
	awaitReadable(t, peer)

	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	wantDeadline(t, l, short)
	proctest.WantError(t, "Send", l.Send(short, nil), context.DeadlineExceeded)
	cancelReceive()
	proctest.WantError(t, "Receive", proctest.Within(t, "Receive", received), context.Canceled)
	cancelSend()
	proctest.WantError(t, "Send", proctest.Within(t, "Send", sent), context.Canceled)
}

func TestConcurrentUse(t *testing.T) {
	parent, child := meet(t)
	const senders, each = 4, 50
	var all sync.WaitGroup
	var got sync.Map
	for i := range senders {
		all.Go(func() {
			for j := range each {
				if err := parent.Send(patience(t), fmt.Appendf(bytes.Repeat([]byte("z"), 5000), "%d.%d", i, j), os.Stderr); err != nil {
					t.Error(err)
				}
			}
		})
		all.Go(func() {
			for range each {
				m, files, err := child.Receive(patience(t))
				if err != nil || len(files) != 1 || len(m) < 5000 {
					t.Errorf("received %d bytes, %d files, %v", len(m), len(files), err)
					continue
				}
				files[0].Close()
				got.Store(string(m), true)
			}
		})
	}
	proctest.Within(t, "all messages", proctest.Waited(&all))
	count := 0
	got.Range(func(any, any) bool { count++; return true })
	if count != senders*each {
		t.Errorf("%d messages have arrived, want %d", count, senders*each)
	}
}

func TestClose(t *testing.T) {
	wantSameDescriptors(t)
	l, peer := meetStranger(t)
	received := proctest.InBackground(func() error {
		_, _, err := l.Receive(context.Background())
		return err
	})
	sent := proctest.InBackground(func() error { return l.Send(context.Background(), make([]byte, link.MaxMessage)) })
	awaitReadable(t, peer)
	l.Close()
	proctest.WantError(t, "Receive", proctest.Within(t, "Receive", received), os.ErrClosed)
	proctest.WantError(t, "Send", proctest.Within(t, "Send", sent), os.ErrClosed)
	proctest.OK(t, l.Close())
}

func TestCloseMeeting(t *testing.T) {
	wantSameDescriptors(t)
	r := new(table)
	m := join(t, r)
	newer := join(t, r)
	accepted, older := accept(t, m), newer.Older()[0]
	last := join(t, r)
	unaccepted := last.Older()[0] // whether newer has taken the claim out of its point, or not
	waiting := proctest.InBackground(func() error { return proctest.ErrorOf(last.Accept(context.Background())) })
	newer.Close()
	wantReceiveError(t, unaccepted, io.EOF)
	last.Close()
	proctest.WantError(t, "Accept", proctest.Within(t, "Accept", waiting), io.EOF)
	proctest.WantError(t, "Accept", proctest.ErrorOf(newer.Accept(patience(t))), io.EOF)
	wantReceiveError(t, older, os.ErrClosed)
	wantReceiveError(t, accepted, io.EOF)

	late := join(t, r).Older()[0] // last's point is closed
	wantReceiveError(t, late, io.EOF)
	proctest.WantError(t, "Send", late.Send(t.Context(), nil), io.EOF)
}

// The points of generations that are dead are passed on no further.
func TestJoinDropsDead(t *testing.T) {
	wantSameDescriptors(t)
	r := new(table)
	var all []*link.Meeting
	wantPassedOn := func(n int) {
		t.Helper()
		all = append(all, join(t, r))
		if older := all[len(all)-1].Older(); len(older) != n || len(r.older) != n {
			t.Errorf("%d links, and %d points passed on, want %d", len(older), len(r.older), n)
		}
	}
	for n := range 4 {
		wantPassedOn(n)
	}
	all[1].Close()
	wantPassedOn(3)
	all[0].Close()
	all[2].Close()
	wantPassedOn(2)
	proctest.OK(t, all[5].Older()[1].Send(t.Context(), []byte("the oldest")))
	for _, l := range all[4].Older() {
		l.Close() // or all[3] would wait for what it says
	}
	for { // behind those who have joined before
		l := accept(t, all[3])
		if message, _, err := l.Receive(patience(t)); err == nil {
			if string(message) != "the oldest" {
				t.Errorf("received %q", message)
			}
			return
		}
	}
}

func TestAcceptWaits(t *testing.T) {
	r := new(table)
	m := join(t, r)
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	accepted := proctest.InBackground(func() error { return proctest.ErrorOf(m.Accept(ctx)) })
	cancel(cause)
	proctest.WantError(t, "Accept", proctest.Within(t, "Accept", accepted), cause)
	child := join(t, r).Older()[0]
	proctest.OK(t, child.Send(t.Context(), []byte("hello")))
	wantMessage(t, accept(t, m), "hello")
}

// Of the claims that nobody accepts, all but the newest are closed.
func TestManyClaims(t *testing.T) {
	wantSameDescriptors(t)
	r := new(table)
	m := join(t, r)
	point := proctest.Opened[*os.File](t)(r.File(""))
	var newest *link.Link
	for range 500 { // more than the queue holds
		if newest != nil {
			defer newest.Close()
		}
		next := joinAt(t, point)
		if newest != nil {
			wantReceiveError(t, newest, io.EOF)
		}
		newest = next
	}
	proctest.OK(t, newest.Send(t.Context(), []byte("newest")))
	wantMessage(t, accept(t, m), "newest")
	point.Close()
	r.close()
	proctest.WantError(t, "Accept", proctest.ErrorOf(m.Accept(patience(t))), io.EOF)
}

// joinAt joins as a child that fails later would, and returns its link.
func joinAt(t *testing.T, point *os.File) *link.Link {
	t.Helper()
	fd, err := descriptor.DuplicateOf(point)
	proctest.OK(t, err)
	r := &table{file: os.NewFile(fd, "fd:")}
	m := join(t, r)
	r.close()
	return m.Older()[0]
}

// A parent that is suspended, and whose queue is full, does not hold up its children.
func TestFullPoint(t *testing.T) {
	wantSameDescriptors(t)
	_, theirs := sockets(t)
	proctest.OK(t, unix.SetNonblock(theirs, true))
	var err error
	for err == nil {
		err = writeFD(theirs, "c")
	}
	m := join(t, &table{file: os.NewFile(uintptr(theirs), "fd:")})
	l := m.Older()[0]
	if _, _, err := l.Receive(patience(t)); !descriptor.IsBlocked(err) {
		t.Errorf("received, %v, want the reason", err)
	}
}

// What was registered by another program under this name is no point.
func TestNoPoint(t *testing.T) {
	wantSameDescriptors(t)
	m := join(t, &table{file: proctest.Must(os.Open(os.Args[0]))})
	if err := m.Older()[0].Send(t.Context(), nil); !errors.Is(err, unix.ENOTSOCK) {
		t.Errorf("sent, %v, want the reason", err)
	}
}

func TestJoinFails(t *testing.T) {
	for _, call := range []string{"File talk", "File talk.1", "RemoveFile talk.1", "AddFile talk.1", "AddFile talk.2", "AddFile talk"} {
		t.Run(call, func(t *testing.T) {
			wantSameDescriptors(t)
			r := new(table)
			join(t, r)
			parent := join(t, r)
			_, err := link.Join(failing{r, call}, "talk")
			if !errors.Is(err, errFailing) || !strings.Contains(err.Error(), `"talk"`) {
				t.Errorf("joined, %v", err)
			}
			if call != "File talk" {
				wantReceiveError(t, accept(t, parent), io.EOF)
			}
		})
	}
}

var errFailing = errors.New("no")

// failing fails in one of its calls.
type failing struct {
	*table
	call string
}

func (f failing) File(name string) (*os.File, error) {
	if f.call == "File "+name {
		return nil, errFailing
	}
	return f.table.File(name)
}

func (f failing) RemoveFile(name string) error {
	if f.call == "RemoveFile "+name {
		return errFailing
	}
	return f.table.RemoveFile(name)
}

func (f failing) AddFile(name string, file *os.File) error {
	if f.call == "AddFile "+name {
		return errFailing
	}
	return f.table.AddFile(name, file)
}

func TestJoinWithoutDescriptors(t *testing.T) {
	wantSameDescriptors(t)
	r := new(table)
	join(t, r)
	join := func(r *table, limit int) {
		t.Helper()
		var before unix.Rlimit
		proctest.OK(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &before))
		_, err := link.Join(exhausting{r, limit}, "talk")
		proctest.OK(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &before))
		if !errors.Is(err, unix.EMFILE) {
			t.Errorf("joined, %v", err)
		}
	}
	join(r, 0)
	join(new(table), 0)
	if closes, err := descriptor.IsCloseOnExec(0); closes || err != nil {
		t.Errorf("standard input has close-on-exec: %t, %v", closes, err)
	}

	// There is one for the pair's second end, but none to take the first's place.
	defer closeStream(t, 0)()
	next := proctest.Must(unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 3))
	unix.Close(next)
	join(new(table), next+1)
}

// exhausting lowers the limit of descriptors once it was asked for a file.
type exhausting struct {
	*table
	limit int
}

func (e exhausting) File(name string) (*os.File, error) {
	file, err := e.table.File(name)
	return file, errors.Join(err, proctest.Limit(unix.RLIMIT_NOFILE, e.limit))
}

// Whatever a peer sends, in whatever pieces, what is received is what was in it, and no
// descriptor is left open.
func FuzzReceive(f *testing.F) {
	f.Add([]byte(header(3, 0)+"abc"+header(0, 1)), byte(1), byte(8))
	f.Add([]byte(header(3, 1)+"abc"+header(1<<24, 1)), byte(200), byte(0))
	f.Add([]byte(header(3, 33)+"abc"), byte(4), byte(3))
	f.Add([]byte{0, 0, 0, 0}, byte(1), byte(0))
	f.Fuzz(func(t *testing.T, data []byte, piece, passAt byte) {
		before := proctest.OpenDescriptors()
		l, peer := meetStranger(t)
		written := make(chan bool)
		go func() {
			defer close(written)
			defer unix.Shutdown(peer, unix.SHUT_WR)
			for i, rest := 0, data; len(rest) > 0; i++ {
				n := min(len(rest), int(piece)+1)
				var fds []int
				if i%(int(passAt)+1) == 0 {
					fds = []int{0}
				}
				if writeFD(peer, string(rest[:n]), fds...) != nil {
					return
				}
				rest = rest[n:]
			}
		}()
		for rest := data; ; {
			message, files, err := l.Receive(patience(t))
			if err != nil {
				break
			}
			want := header(len(message), len(files)) + string(message)
			if !bytes.HasPrefix(rest, []byte(want)) {
				t.Fatalf("received %q, which was not sent", want)
			}
			rest = rest[len(want):]
			closeFiles(files)
		}
		l.Close()
		proctest.Within(t, "the peer", written)
		if after := proctest.OpenDescriptors(); after > before+3 { // the peer, the point, and its other end
			t.Errorf("%d descriptors are open, and were %d", after, before)
		}
	})
}
