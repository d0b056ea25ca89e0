// Package upstream speaks the handover of github.com/cloudflare/tableflip v1.2.3, so that
// a service can come from that library, and go back to it, by an upgrade.
//
// A parent with that library sets a variable in the child's environment
// ([inherit.Upstream]), and never removes the one that it got itself. The child finds as
// descriptor 3 the write end of a pipe on which one byte, [ReadyByte], says that it is
// ready. The parent takes that for granted and drains: there is no verdict. Descriptor 4 is
// the read end of a pipe on which a gob (encoding/gob) of type [][]string names the
// descriptors from 5 on, each by kind, network and address. The pipe ends when the parent
// exits.
package upstream

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/process"
)

// ReadyByte is what a child says when it is ready.
const ReadyByte = 42

const (
	// namesTimeout is how long a parent may take to name the descriptors, which it does
	// as soon as it has started its child.
	namesTimeout = 10 * time.Second

	// unprovenTimeout is namesTimeout if the parent may be another process's.
	unprovenTimeout = time.Second
)

// A Parent is a process with the other library that has started this one.
type Parent struct {
	PID   int              // 0 if that is not certain
	Names []nametable.Name // of the descriptors from inherit.FirstFD on
	Pipe  *os.File         // ends when the parent exits
}

// Find returns the parent of this process if it runs the other library and waits for this
// process, or nil. The subprocesses of a service with that library have its variable, too,
// and often its pipes. So on Linux Find asks whether this process's parent holds the other
// end of descriptor 3, and does not block unless it does. Where it can't know that, it
// waits a second for the names. Every call returns the same.
var Find = sync.OnceValues(find)

func find() (*Parent, error) {
	if !inherit.HasUpstream() || !isPipe(inherit.ReadyFD, os.O_WRONLY) || !isPipe(inherit.VerdictFD, os.O_RDONLY) {
		return nil, nil
	}
	_, inode, err := descriptor.IdentifyPipe(inherit.ReadyFD)
	if err != nil {
		return nil, err
	}
	p, timeout := &Parent{PID: os.Getppid()}, namesTimeout
	switch awaits, err := process.HoldsPipe(p.PID, inode, process.ReadEnd); {
	case err != nil:
		p.PID, timeout = 0, unprovenTimeout
	case !awaits:
		return nil, nil
	}

	deadline := time.Now().Add(timeout)
	readable := awaitReadable(deadline)
	if !readable && p.PID == 0 {
		return nil, nil
	}
	err = errors.New("it said nothing")
	if readable {
		err = p.read(deadline)
	}
	if err != nil {
		return nil, fmt.Errorf("tableflip: can't read what the parent, which uses cloudflare/tableflip, passes on: %w", err)
	}
	return p, nil
}

func isPipe(fd uintptr, mode int) bool {
	got, err := descriptor.AccessMode(fd)
	if err != nil || got != mode {
		return false
	}
	_, _, err = descriptor.IdentifyPipe(fd)
	return err == nil
}

// awaitReadable reports whether the names arrive before the deadline. It changes nothing
// about the pipe, which may belong to another process.
func awaitReadable(deadline time.Time) bool {
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		switch readable, hungUp := descriptor.Poll(inherit.VerdictFD); {
		case readable:
			return true
		case hungUp || time.Now().After(deadline):
			return false
		}
		time.Sleep(pause)
	}
}

// read reads the names.
func (p *Parent) read(deadline time.Time) error {
	// So that waiting for the parent to exit takes no thread.
	if err := descriptor.SetNonblock(inherit.VerdictFD, true); err != nil {
		return err
	}
	p.Pipe = os.NewFile(inherit.VerdictFD, "parent")
	if err := p.Pipe.SetReadDeadline(deadline); err != nil {
		return err
	}
	var err error
	if p.Names, err = Decode(p.Pipe); err != nil {
		return err
	}
	return p.Pipe.SetReadDeadline(time.Time{})
}

// What follows is the part of encoding/gob that a [][]string needs. The package itself
// would make every program that imports this library larger and slower to start.
//
// A gob is a sequence of messages, each preceded by its length. A message begins with the
// number of a type. If that is negative, the message defines the type, and otherwise it
// holds a value: a zero, because it is no struct, and the number of elements before the
// elements of each slice. Decode need not look at the definitions.

// typeNumber is the first number that encoding/gob gives to a type of its caller, as a
// signed number, of which the lowest bit says that it is negative.
const typeNumber = 65 << 1

// definitions define a type of slices of a type of slices of strings.
const definitions = "\x0d\xff\x81\x02\x01\x02\xff\x82\x00\x01\xff\x80\x00\x00" +
	"\x0b\x7f\x02\x01\x02\xff\x80\x00\x01\x0c\x00\x00"

// Encode returns the gob of names.
func Encode(names []nametable.Name) []byte {
	value := append(appendNumber(nil, typeNumber), 0)
	value = appendNumber(value, uint64(len(names)))
	for _, n := range names {
		fields := []string{n.Kind, n.Network, n.Addr}
		value = appendNumber(value, uint64(len(fields)))
		for _, field := range fields {
			value = append(appendNumber(value, uint64(len(field))), field...)
		}
	}
	return append(appendNumber([]byte(definitions), uint64(len(value))), value...)
}

// appendNumber writes a small number as a byte, and another as its length in bytes,
// negated, and its bytes.
func appendNumber(b []byte, n uint64) []byte {
	if n < 0x80 {
		return append(b, byte(n))
	}
	size := 1
	for n>>(8*size) != 0 {
		size++
	}
	b = append(b, byte(-size))
	for size--; size >= 0; size-- {
		b = append(b, byte(n>>(8*size)))
	}
	return b
}

// maxMessage bounds what a garbled length makes Decode allocate. It has room for more names
// than a process can have descriptors.
const maxMessage = 64 << 20

var errGarbled = errors.New("the names of the descriptors are garbled")

// Decode reads names, and nothing behind them.
func Decode(r io.Reader) ([]nametable.Name, error) {
	for {
		size, err := readNumber(r)
		if err != nil {
			return nil, err
		}
		if size > maxMessage {
			return nil, errGarbled
		}
		message, err := io.ReadAll(io.LimitReader(r, int64(size)))
		if err != nil {
			return nil, err
		}
		if uint64(len(message)) < size {
			return nil, io.ErrUnexpectedEOF
		}
		rest := &fields{rest: message}
		if isDefinition := rest.number()&1 != 0; isDefinition {
			continue
		}
		return rest.names()
	}
}

func readNumber(r io.Reader) (uint64, error) {
	encoded := make([]byte, 9)
	if _, err := io.ReadFull(r, encoded[:1]); err != nil {
		return 0, err
	}
	size := sizeOf(encoded[0])
	if size > 8 {
		return 0, errGarbled
	}
	if _, err := io.ReadFull(r, encoded[1:1+size]); err != nil {
		return 0, err
	}
	f := &fields{rest: encoded}
	return f.number(), nil
}

// sizeOf returns how many bytes of a number follow its first one.
func sizeOf(first byte) int {
	if first < 0x80 {
		return 0
	}
	return -int(int8(first))
}

// fields are what is left of a message, or garbled.
type fields struct {
	rest    []byte
	garbled bool
}

func (f *fields) names() ([]nametable.Name, error) {
	if f.number() != 0 {
		return nil, errGarbled
	}
	names := []nametable.Name{}
	for range f.number() {
		if f.number() != 3 {
			f.garbled = true
		}
		n := nametable.Name{Kind: f.text(), Network: f.text(), Addr: f.text()}
		if f.garbled {
			return nil, errGarbled
		}
		names = append(names, n)
	}
	if f.garbled || len(f.rest) > 0 {
		return nil, errGarbled
	}
	return names, nil
}

func (f *fields) number() (n uint64) {
	first := f.take(1)
	if f.garbled {
		return 0
	}
	size := sizeOf(first[0])
	if size == 0 {
		return uint64(first[0])
	}
	if size > 8 {
		f.garbled = true
		return 0
	}
	for _, b := range f.take(uint64(size)) {
		n = n<<8 | uint64(b)
	}
	return n
}

func (f *fields) text() string { return string(f.take(f.number())) }

func (f *fields) take(size uint64) []byte {
	if uint64(len(f.rest)) < size {
		f.garbled = true
		return nil
	}
	taken := f.rest[:size]
	f.rest = f.rest[size:]
	return taken
}
