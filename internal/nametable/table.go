package nametable

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"example.com/tableflip/internal/inherit"
)

// The variable TABLEFLIP_HANDOVER holds the header, words separated by spaces:
//
//	VERSION READY VERDICT WORD=VALUE…
//
// READY and VERDICT are the device and inode, as DEVICE:INODE, of the pipes
// that the child finds as its descriptors 3 and 4. Every version begins with
// these three words, so that any binary can tell a table that is meant for it
// from one that leaked from an unrelated process. A word that a binary does not know
// is ignored. The words of this version are
//
//	fds=N      how many descriptors the child finds from 5 on
//	parts=N    how many variables name them
//	pid=N      the sender's process ID
//	pidns=N    the sender's PID namespace, where there are such
//	until=N    how long the sender waits, in milliseconds since 1970
//	token=T    the text that the child can read from the verdict pipe at once, where
//	           devices and inodes do not tell a pipe from all others or from earlier ones
//	offers=A,… what the sender understands beyond the handover itself
//	generation=N  the sender's number, counted from the first generation, 1
//	since=N    when the sender took charge, in milliseconds since 1970
//
// The variables TABLEFLIP_HANDOVER_0 to _(PARTS-1), put together, hold the
// descriptors from 5 on, separated by semicolons. The fields of each are
// separated by commas, empty ones at the end left out:
//
//	KIND,NETWORK,ADDRESS,BOUNDADDR,PATH,FILEID,FDNAME
//
// Names are arbitrary bytes. Those that would be ambiguous are written as a percent sign
// and two hexadecimal digits.

const (
	version = "1"

	variable = inherit.Variable

	// Linux refuses a longer string than 32 pages (MAX_ARG_STRLEN, execve(2)).
	maxPart = 32*4096 - 1024
)

// A Table tells a child what its parent passed to it.
type Table struct {
	Ready, Verdict PipeID
	PID            int       // of the sender
	PIDNamespace   string    // of the sender, or empty
	Until          time.Time // to the millisecond: how long the sender waits
	Token          string    // what identifies the pipes where their PipeIDs do not
	Offers         []string
	Generation     int       // of the sender, or 0 if it does not say
	Since          time.Time // to the millisecond: when the sender took charge, or zero
	Entries        []*Entry
}

// A PipeID tells a pipe from all others that are open.
type PipeID struct {
	Device, Inode uint64
}

func (id PipeID) String() string {
	return strconv.FormatUint(id.Device, 10) + ":" + strconv.FormatUint(id.Inode, 10)
}

func parsePipeID(text string) (PipeID, error) {
	device, inode, found := strings.Cut(text, ":")
	if !found {
		return PipeID{}, fmt.Errorf("%q is not a device and an inode", text)
	}

	var id PipeID
	var deviceErr, inodeErr error
	id.Device, deviceErr = strconv.ParseUint(device, 10, 64)
	id.Inode, inodeErr = strconv.ParseUint(inode, 10, 64)
	return id, errors.Join(deviceErr, inodeErr)
}

// Encode returns the variables that carry the table, as NAME=VALUE.
func (t Table) Encode() []string {
	variables := []string{""} // for the header, which is known last
	for rest := encodeEntries(t.Entries); rest != ""; {
		size := min(len(rest), maxPart)
		variables = append(variables, partName(len(variables)-1)+"="+rest[:size])
		rest = rest[size:]
	}
	variables[0] = t.encodeHeader(len(variables) - 1)
	return variables
}

func partName(i int) string { return variable + "_" + strconv.Itoa(i) }

// encodeHeader does not use package fmt, because this process waits for it.
func (t Table) encodeHeader(parts int) string {
	var header strings.Builder
	header.Grow(256)
	header.WriteString(variable + "=" + version)
	add := func(words ...string) {
		header.WriteByte(' ')
		for _, word := range words {
			header.WriteString(word)
		}
	}
	number := func(name string, value int64) { add(name, "=", strconv.FormatInt(value, 10)) }

	add(t.Ready.String())
	add(t.Verdict.String())
	number("fds", int64(len(t.Entries)))
	number("parts", int64(parts))
	number("pid", int64(t.PID))
	number("until", t.Until.UnixMilli())
	if t.PIDNamespace != "" {
		add("pidns=", t.PIDNamespace)
	}
	if t.Token != "" {
		add("token=", t.Token)
	}
	if len(t.Offers) > 0 {
		add("offers=", strings.Join(t.Offers, ","))
	}
	if t.Generation != 0 {
		number("generation", int64(t.Generation))
	}
	if !t.Since.IsZero() {
		number("since", t.Since.UnixMilli())
	}
	return header.String()
}

func encodeEntries(entries []*Entry) string {
	var text strings.Builder
	text.Grow(64 * len(entries))
	for i, e := range entries {
		if i > 0 {
			text.WriteByte(';')
		}
		fields := [...]string{e.Kind, e.Network, e.Addr, e.BoundAddr, e.Path, e.FileID, e.FDName}
		last := len(fields)
		for last > 0 && fields[last-1] == "" {
			last--
		}
		for j, field := range fields[:last] {
			if j > 0 {
				text.WriteByte(',')
			}
			writeEscaped(&text, field)
		}
	}
	return text.String()
}

// writeEscaped is the inverse of url.PathUnescape.
func writeEscaped(text *strings.Builder, field string) {
	plain := 0 // from here on, nothing has been written
	for i := range len(field) {
		if c := field[i]; c <= ' ' || c > '~' || c == '%' || c == ',' || c == ';' {
			text.WriteString(field[plain:i])
			fmt.Fprintf(text, "%%%02X", c)
			plain = i + 1
		}
	}
	text.WriteString(field[plain:])
}

// An UnknownVersionError is the error for a header whose remainder only another version of
// this package can read.
type UnknownVersionError string

func (v UnknownVersionError) Error() string {
	return fmt.Sprintf("tableflip: the parent hands over by version %.20q, and this binary knows version %q: "+
		"stop the service and start it with this binary", string(v), version)
}

// Decode is the inverse of Encode. With an UnknownVersionError, the pipes of the
// table are valid all the same.
func Decode(variables map[string]string) (Table, error) {
	t, count, parts, err := decodeHeader(variables[variable])
	if err != nil {
		return t, err
	}

	var text strings.Builder
	for i := range parts {
		part, ok := variables[partName(int(i))]
		if !ok {
			return Table{}, garbled("%s, one of %d parts, is missing", partName(int(i)), parts)
		}
		text.WriteString(part)
	}
	t.Entries, err = decodeEntries(text.String(), count)
	if err != nil {
		return Table{}, err
	}
	return t, nil
}

func garbled(format string, args ...any) error {
	return fmt.Errorf("tableflip: garbled environment variable %s: %w (to start without a parent, unset it)",
		variable, fmt.Errorf(format, args...))
}

func decodeHeader(text string) (t Table, count, parts uint64, err error) {
	// No environment holds these. What is decoded can be encoded again.
	if strings.ContainsRune(text, 0) || len(text) > maxPart {
		return Table{}, 0, 0, garbled("%d bytes, or a NUL among them, in %.80q", len(text), text)
	}
	header := strings.Split(text, " ")
	if len(header) < 3 {
		return Table{}, 0, 0, garbled("%d words in %.80q", len(header), text)
	}

	var readyErr, verdictErr error
	t.Ready, readyErr = parsePipeID(header[1])
	t.Verdict, verdictErr = parsePipeID(header[2])
	if err := errors.Join(readyErr, verdictErr); err != nil {
		return Table{}, 0, 0, garbled("pipes: %w", err)
	}
	if header[0] != version {
		return t, 0, 0, UnknownVersionError(header[0])
	}

	words := make(map[string]string)
	for _, word := range header[3:] {
		name, value, _ := strings.Cut(word, "=")
		words[name] = value
	}
	numbers := make(map[string]uint64)
	for _, word := range []struct {
		name     string
		bits     int
		optional bool
	}{
		{"fds", 31, false},
		{"parts", 31, false},
		{"pid", 31, false},
		{"until", 53, false},
		{"generation", 31, true},
		{"since", 53, true},
	} {
		text := words[word.name]
		if text == "" && word.optional {
			continue
		}
		if numbers[word.name], err = strconv.ParseUint(text, 10, word.bits); err != nil {
			return Table{}, 0, 0, garbled("%s: %w", word.name, err)
		}
	}
	t.PID = int(numbers["pid"])
	t.Until = time.UnixMilli(int64(numbers["until"]))
	t.PIDNamespace, t.Token = words["pidns"], words["token"]
	t.Generation = int(numbers["generation"])
	if since := numbers["since"]; since != 0 {
		t.Since = time.UnixMilli(int64(since))
	}
	if words["offers"] != "" {
		t.Offers = strings.Split(words["offers"], ",")
	}
	return t, numbers["fds"], numbers["parts"], nil
}

func decodeEntries(text string, count uint64) ([]*Entry, error) {
	if count == 0 {
		if text != "" {
			return nil, garbled("no descriptors announced, and names found")
		}
		return nil, nil
	}
	// The text is at least as long as its separators, which bounds what a
	// wrong count makes this allocate.
	if separators := strings.Count(text, ";"); uint64(separators)+1 != count {
		return nil, garbled("%d descriptors announced, %d found", count, separators+1)
	}

	entries := make([]Entry, count)
	pointers := make([]*Entry, 0, count)
	for encoded := range strings.SplitSeq(text, ";") {
		e := &entries[len(pointers)]
		if err := e.decode(encoded); err != nil {
			return nil, garbled("descriptor %d: %w", len(pointers), err)
		}
		pointers = append(pointers, e)
	}
	return pointers, nil
}

func (e *Entry) decode(encoded string) error {
	fields := [...]*string{&e.Kind, &e.Network, &e.Addr, &e.BoundAddr, &e.Path, &e.FileID, &e.FDName}
	next := 0
	for field := range strings.SplitSeq(encoded, ",") {
		if next == len(fields) {
			return nil // a later version's
		}
		var err error
		if *fields[next], err = url.PathUnescape(field); err != nil {
			return err
		}
		next++
	}
	return nil
}
