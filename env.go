package tableflip

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
)

// This file owns the name table and how it travels in the environment.
//
// The variable TABLEFLIP_HANDOVER holds the header, fields separated by spaces:
//
//	VERSION READY VERDICT DESCRIPTORS PARTS
//
// READY and VERDICT are the device and inode, as DEVICE:INODE, of the pipes
// that the child finds as its descriptors 3 and 4. Every version begins with
// these three fields, so that any binary can tell a table that is meant for it
// from one that leaked from an unrelated process.
//
// The variables TABLEFLIP_HANDOVER_0 to _(PARTS-1), put together, hold the
// descriptors from 5 on, separated by semicolons. The fields of each are
// separated by commas, empty ones at the end left out:
//
//	KIND,NETWORK,ADDRESS,GIVEN,PATH,FDNAME
//
// Names are arbitrary bytes, so that those that would be in the way are written as
// a percent sign and two hexadecimal digits.

const (
	tableVersion  = "1"
	tableVariable = "TABLEFLIP_HANDOVER"

	// Linux refuses a longer string than 32 pages (MAX_ARG_STRLEN, execve(2)).
	maxPart = 32*4096 - 1024
)

// An identity tells one pipe from all others that are open.
type identity struct {
	device, inode uint64
}

func (id identity) String() string {
	return fmt.Sprintf("%d:%d", id.device, id.inode)
}

func parseIdentity(text string) (identity, error) {
	device, inode, found := strings.Cut(text, ":")
	if !found {
		return identity{}, fmt.Errorf("%q is not a device and an inode", text)
	}
	var id identity
	var deviceErr, inodeErr error
	id.device, deviceErr = strconv.ParseUint(device, 10, 64)
	id.inode, inodeErr = strconv.ParseUint(inode, 10, 64)
	return id, errors.Join(deviceErr, inodeErr)
}

// A table tells a child what its parent passed to it.
type table struct {
	ready, verdict identity
	descriptors    []*descriptor
}

// A descriptor is what the name table says about one descriptor.
type descriptor struct {
	name
	given  string // the address that the kernel chose, where name left it open
	path   string // absolute, of a Unix socket's file
	fdName string // what the service manager calls it, if it passed or keeps it
}

// encode returns the variables that carry the table, as NAME=VALUE.
func (t table) encode() []string {
	var text strings.Builder
	text.Grow(64 * len(t.descriptors))
	for i, d := range t.descriptors {
		if i > 0 {
			text.WriteByte(';')
		}
		fields := [...]string{d.kind, d.network, d.addr, d.given, d.path, d.fdName}
		used := len(fields)
		for used > 0 && fields[used-1] == "" {
			used--
		}
		for j, field := range fields[:used] {
			if j > 0 {
				text.WriteByte(',')
			}
			writeEscaped(&text, field)
		}
	}

	parts := 0
	variables := []string{""}
	for rest := text.String(); rest != ""; parts++ {
		size := min(len(rest), maxPart)
		variables = append(variables, fmt.Sprintf("%s_%d=%s", tableVariable, parts, rest[:size]))
		rest = rest[size:]
	}
	variables[0] = fmt.Sprintf("%s=%s %s %s %d %d", tableVariable,
		tableVersion, t.ready, t.verdict, len(t.descriptors), parts)
	return variables
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

// An unknownVersion is the error of a header whose remainder only another
// version of this package can read.
type unknownVersion string

func (v unknownVersion) Error() string {
	return fmt.Sprintf("tableflip: the parent hands over by version %.20q, and this binary knows version %q: "+
		"stop the service and start it with this binary", string(v), tableVersion)
}

// decodeTable is the inverse of encode. With an unknownVersion error the pipes
// of the table are valid all the same.
func decodeTable(variables map[string]string) (table, error) {
	garbled := func(format string, args ...any) error {
		return fmt.Errorf("tableflip: garbled environment variable %s: %w (to start without a parent, unset it)",
			tableVariable, fmt.Errorf(format, args...))
	}

	var t table
	header := strings.Split(variables[tableVariable], " ")
	if len(header) < 3 {
		return table{}, garbled("%d fields in %.80q", len(header), variables[tableVariable])
	}
	var readyErr, verdictErr error
	t.ready, readyErr = parseIdentity(header[1])
	t.verdict, verdictErr = parseIdentity(header[2])
	if err := errors.Join(readyErr, verdictErr); err != nil {
		return table{}, garbled("pipes: %w", err)
	}
	if header[0] != tableVersion {
		return t, unknownVersion(header[0])
	}
	if len(header) != 5 {
		return table{}, garbled("%d fields in %.80q", len(header), variables[tableVariable])
	}
	count, countErr := strconv.ParseUint(header[3], 10, 31)
	parts, partsErr := strconv.ParseUint(header[4], 10, 31)
	if err := errors.Join(countErr, partsErr); err != nil {
		return table{}, garbled("%w", err)
	}

	text := ""
	for i := range parts {
		part, ok := variables[fmt.Sprintf("%s_%d", tableVariable, i)]
		if !ok {
			return table{}, garbled("%s_%d, one of %d parts, is missing", tableVariable, i, parts)
		}
		text += part
	}
	if count == 0 {
		if text != "" {
			return table{}, garbled("no descriptors announced, and names found")
		}
		return t, nil
	}
	// The text is at least as long as its separators, which bounds what a
	// wrong count makes this allocate.
	if separators := strings.Count(text, ";"); uint64(separators)+1 != count {
		return table{}, garbled("%d descriptors announced, %d found", count, separators+1)
	}
	descriptors := make([]descriptor, count)
	t.descriptors = make([]*descriptor, 0, count)
	for encoded := range strings.SplitSeq(text, ";") {
		d := &descriptors[len(t.descriptors)]
		if err := d.decode(encoded); err != nil {
			return table{}, garbled("descriptor %d: %w", len(t.descriptors), err)
		}
		t.descriptors = append(t.descriptors, d)
	}
	return t, nil
}

func (d *descriptor) decode(encoded string) error {
	fields := [...]*string{&d.kind, &d.network, &d.addr, &d.given, &d.path, &d.fdName}
	next := 0
	for field := range strings.SplitSeq(encoded, ",") {
		if next == len(fields) {
			return fmt.Errorf("more than %d fields", len(fields))
		}
		var err error
		if *fields[next], err = url.PathUnescape(field); err != nil {
			return err
		}
		next++
	}
	return nil
}

// pending holds the variables of a table between being taken out of the
// environment and being used, so that a New that failed can be tried again and
// a child with an unreadable table never becomes a first generation.
var pending struct {
	sync.Mutex
	variables map[string]string
}

// takeVariables moves the variables of a table out of the environment, where
// this process's own children would see them. It returns nil if there are none.
func takeVariables() (map[string]string, error) {
	pending.Lock()
	defer pending.Unlock()
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		if !isTableVariable(name) {
			continue
		}
		if err := os.Unsetenv(name); err != nil {
			return nil, fmt.Errorf("tableflip: remove %s from the environment: %w", name, err)
		}
		if pending.variables == nil {
			pending.variables = make(map[string]string)
		}
		pending.variables[name] = value
	}
	return pending.variables, nil
}

// forgetVariables is called once the table has been used.
func forgetVariables() {
	pending.Lock()
	defer pending.Unlock()
	pending.variables = nil
}

func isTableVariable(name string) bool {
	return name == tableVariable || strings.HasPrefix(name, tableVariable+"_")
}
