// Package link lets a generation talk with its successor. A conversation is a [Link],
// which carries messages and descriptors in both directions. The two find each other at
// a [Meeting], for which each generation has a place in the registry of its Upgrader:
//
//	parent                                child
//	Join: make a pair of sockets
//	  keep one end, the point
//	  AddFile(name, the other end)
//	Upgrade: start child ───────────────▶ Join: File(name)
//	                                        make a pair of its own
//	Accept ◀──── one byte, one end of it ─  the claim
//	                                        AddFile(name), as the parent did
//	         ◀────────── link ──────────▶
//	Exit is closed ◀───────────────────── Ready returns nil
//	Send                                  Older, Receive
//
// The registered pair is only a meeting point. The parent's registry holds the child's
// end of it, so the death of a child does not end it, and what a dead child has written
// stays in it. That is why each child brings a pair of its own. The arrival of one end
// tells the parent that there is a child that knows links. The end of file that this end
// reads later tells that the child is dead, or has closed the other. A claim is a single
// byte, which cannot arrive by halves: whatever a child does or suffers, the next one
// finds the point as it was. A version without links does not claim the entry, and
// closes it when it takes charge. The next version with links begins anew.
//
// # Before and after the commit
//
// A child that has claimed may still fail. Whatever must not be lost with it is sent
// once the parent's Exit is closed and Replaced is true. A child must not Receive from
// an older generation before Ready has returned, because until then the older one has
// no reason to say anything, and what it said would be lost if the child failed. The
// package reads nothing from a Link by itself.
//
// # Several generations that drain
//
// A point takes any number of claims, and outlives its generation's replacement, so that
// a later child can claim there, too. Join passes on the points of the older generations
// that live by the names NAME.1, for the parent's, NAME.2 and so on, and claims at each. So
// every generation has a link of its own to each that came after it, which Accept returns,
// and which does not depend on those in between.
//
// # The sockets
//
// They are Unix stream sockets, because macOS has no SOCK_SEQPACKET in this family, and
// datagram sockets have no end of file. So messages have a header:
//
//	4 bytes   length of the message, big endian
//	1 byte    number of descriptors, which travel with the first byte of the header
//
// All descriptors have close-on-exec, or a process that somebody starts would keep a
// dead generation's link open. Not all systems can make or receive a descriptor that has
// it from the beginning, so it is set while [syscall.ForkLock] keeps this process from
// starting another. Where the system cannot, net.UnixConn.ReadMsgUnix does not take that
// lock, and is not used because of that.
package link

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"example.com/tableflip/internal/descriptor"
)

const (
	// MaxMessage is the length of the longest message, in bytes.
	MaxMessage = 1 << 20

	// MaxDescriptors is how many descriptors one message can carry.
	MaxDescriptors = 32

	headerSize = 5
)

var (
	// errGarbage is part of errors about what is no message.
	errGarbage = errors.New("tableflip: unintelligible message")

	errSentInPart = errors.New("tableflip: an earlier message was sent in part, which has closed the link")

	// errLost comes with what could be received.
	errLost = errors.New("descriptors were lost: more than a message can carry, or than this process may have open")
)

// A Link is a conversation with another generation. One Send and one Receive are at
// work at a time, others wait for their turn. Its methods are safe for concurrent use.
// Close must be called.
type Link struct {
	file     *os.File
	sending  chan struct{} // holds a value while a Send has its turn
	incoming chan *frame   // holds what has arrived of a message, except in a Receive's turn

	open context.Context // its cause is why nothing can be sent or received any more
	end  context.CancelCauseFunc
}

// A frame is a message that has arrived in part.
type frame struct {
	buf   []byte // the header until that is complete, then the message, too
	got   int
	files []*os.File
}

// newLink takes file over.
func newLink(file *os.File) *Link {
	l := &Link{file: file, sending: make(chan struct{}, 1), incoming: make(chan *frame, 1)}
	l.open, l.end = context.WithCancelCause(context.Background())
	l.incoming <- newFrame()
	return l
}

func newFrame() *frame { return &frame{buf: make([]byte, headerSize)} }

// Send sends a message with duplicates of descriptors, which stay the caller's. While
// the other process does not read and the socket's buffer is full, it blocks until ctx
// is done. Then the message has not been sent at all, or else in part, which closes the
// Link. If the other process is dead or has closed its end, the error is io.EOF. That
// Send has returned nil does not mean that anybody has read the message.
func (l *Link) Send(ctx context.Context, message []byte, descriptors ...syscall.Conn) error {
	if len(message) > MaxMessage || len(descriptors) > MaxDescriptors {
		return fmt.Errorf("tableflip: a message of %d bytes with %d descriptors: a link takes %d with %d", len(message), len(descriptors), MaxMessage, MaxDescriptors)
	}
	var fds []int
	for _, d := range descriptors {
		fd, err := descriptor.DuplicateOf(d) // its owner may close it meanwhile
		if err != nil {
			return fmt.Errorf("tableflip: send a descriptor: %w", err)
		}
		defer descriptor.Close(fd)
		fds = append(fds, int(fd))
	}
	rest := binary.BigEndian.AppendUint32(make([]byte, 0, headerSize+len(message)), uint32(len(message)))
	rest = append(append(rest, byte(len(fds))), message...)

	select {
	case l.sending <- struct{}{}:
		defer func() { <-l.sending }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return l.until(ctx, l.file.SetWriteDeadline, func() error {
		for len(rest) > 0 {
			n, err := send(l.file, rest, fds, true)
			if err != nil {
				if len(rest) < headerSize+len(message) && err != io.EOF {
					l.fail(errSentInPart)
				}
				return err
			}
			rest, fds = rest[n:], nil
		}
		return nil
	})
}

// Receive returns the next message with its descriptors, which the caller owns. It
// blocks until there is one, or until ctx is done. Nothing is lost then: the next
// Receive goes on where this one has stopped. If the other process is dead or has
// closed its end, the error is io.EOF once all its messages were received, or
// io.ErrUnexpectedEOF if the last one was cut. What is no message ends the Link.
func (l *Link) Receive(ctx context.Context) (message []byte, files []*os.File, err error) {
	var f *frame
	select {
	case f = <-l.incoming:
		defer func() { l.incoming <- f }()
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
	err = l.until(ctx, l.file.SetReadDeadline, func() error {
		err := f.read(l.file)
		if errors.Is(err, errGarbage) {
			l.fail(err)
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	message, files = f.buf[headerSize:], f.files
	f = newFrame()
	return message, files, nil
}

// read completes f.
func (f *frame) read(from *os.File) error {
	for f.got < len(f.buf) {
		n, files, err := receive(from, f.buf[f.got:])
		f.got += n
		f.files = append(f.files, files...)
		switch {
		case err == errLost || len(f.files) > MaxDescriptors:
			return fmt.Errorf("%w: %w", errGarbage, errLost)
		case err == io.EOF && f.got > 0:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
		if f.got == headerSize { // once, because that was the buffer's end
			length := binary.BigEndian.Uint32(f.buf)
			if length > MaxMessage {
				return fmt.Errorf("%w: its length is %d", errGarbage, length)
			}
			f.buf = append(f.buf, make([]byte, length)...)
		}
	}
	if announced := int(f.buf[headerSize-1]); announced != len(f.files) {
		return fmt.Errorf("%w: it has %d descriptors instead of %d", errGarbage, len(f.files), announced)
	}
	return nil
}

// until returns what call does, which setDeadline interrupts when ctx is done.
func (l *Link) until(ctx context.Context, setDeadline func(time.Time) error, call func() error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case l.open.Err() != nil:
		return context.Cause(l.open)
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = setDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	err := call()
	if !stop() {
		<-interrupted
		_ = setDeadline(time.Time{})
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return context.Cause(ctx)
	case err != nil && l.open.Err() != nil:
		return context.Cause(l.open)
	}
	return err
}

// Close ends the conversation. The other process gets io.EOF. Send and Receive return
// os.ErrClosed, also if they are at work.
func (l *Link) Close() error {
	l.fail(os.ErrClosed)
	f := <-l.incoming // at once, now that the file is closed
	closeAll(f.files)
	l.incoming <- f
	return nil
}

// fail has all methods return err from now on, unless they fail already.
func (l *Link) fail(err error) {
	l.end(err)
	l.file.Close()
}

func closeAll(files []*os.File) {
	for _, file := range files {
		file.Close()
	}
}
