package nametable

import (
	"errors"
	"fmt"
	"reflect"
	"runtime/metrics"
	"strings"
	"testing"
	"time"

	"example.com/tableflip/internal/inherit"
)

// maxVariable is MAX_ARG_STRLEN of Linux, which counts the name, the equals sign
// and the final NUL.
const maxVariable = 32 * 4096

// environment makes a map of variables as encode returns them.
func environment(t testing.TB, variables []string) map[string]string {
	t.Helper()
	env := map[string]string{}
	for _, variable := range variables {
		name, value, found := strings.Cut(variable, "=")
		if !found || !inherit.IsVariable(name) {
			t.Fatalf("%.80q is not a variable of the table", variable)
		}
		if strings.ContainsRune(variable, 0) {
			t.Fatalf("%.80q holds a NUL", variable)
		}
		if size := len(variable) + 1; size > maxVariable {
			t.Fatalf("%s takes %d bytes, more than %d", name, size, maxVariable)
		}
		if _, ok := env[name]; ok {
			t.Fatalf("%s twice", name)
		}
		env[name] = value
	}
	return env
}

func checkRoundTrip(t testing.TB, before Table) {
	t.Helper()
	after, err := Decode(environment(t, before.Encode()))
	if err != nil {
		t.Fatalf("decode(encode(%.1000q)): %v", show(before), err)
	}
	if !reflect.DeepEqual(after, before) {
		t.Fatalf("decode(encode(x)) = %.1000q, want %.1000q", show(after), show(before))
	}
}

func show(t Table) string {
	text := fmt.Sprint(t.Ready, t.Verdict, t.PID, t.PIDNamespace, t.Until, t.Token, t.Offers, t.Generation, t.Since)
	for _, d := range t.Entries {
		text += fmt.Sprintf(" %+v", *d)
	}
	return text
}

func tableOf(entries ...Entry) Table {
	t := Table{
		Ready: PipeID{1, 2}, Verdict: PipeID{1<<64 - 1, 0}, PID: 7, PIDNamespace: "8",
		Until: time.UnixMilli(1234), Token: "abc", Offers: []string{"reload", "more"},
		Generation: 3, Since: time.UnixMilli(1230),
	}
	for _, d := range entries {
		t.Entries = append(t.Entries, &d)
	}
	return t
}

func manyEntries(count, nameSize int) []Entry {
	entries := make([]Entry, count)
	for i := range entries {
		entries[i].Kind = File
		entries[i].Network = fmt.Sprintf("%0*d", nameSize, i)
	}
	return entries
}

func TestTableRoundTrip(t *testing.T) {
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	for _, test := range []struct {
		story   string
		entries []Entry
	}{
		{"nothing passed on", nil},
		{"one descriptor without a name", []Entry{{}}},
		{"several without a name", make([]Entry, 3)},
		{"all fields", []Entry{{Name{Listener, "unix", ""}, "@00001", "/run/a.sock", "1:2", "a.socket"}}},
		{"some fields", []Entry{{Name: Name{File, "log", ""}}, {Path: "/only"}, {Name: Name{Addr: "only"}}}},
		{"every byte", []Entry{{Name{string(every), string(every), string(every)}, string(every), string(every), string(every), string(every)}}},
		{"separators", []Entry{{Name: Name{";", ",", "%"}}, {Name: Name{" ", "=", "+"}}, {Name: Name{",,,,,", ";;;", "\n"}}}},
		{"not UTF-8", []Entry{{Name: Name{File, "\xff\xfe\x80", "\xc3"}}}},
		{"many", manyEntries(5000, 10)},
		{"one name of 1 MiB", manyEntries(1, 1<<20)},
	} {
		t.Run(test.story, func(t *testing.T) {
			checkRoundTrip(t, tableOf(test.entries...))
		})
	}
}

// The sizes around the end of a part, each with bytes that are escaped, so that
// the cut goes through escapes as well.
func TestTableIsSplit(t *testing.T) {
	for _, size := range []int{maxPart - 10, maxPart, maxPart + 10, 2*maxPart + 10} {
		for shift := range 3 {
			before := tableOf(Entry{Name: Name{File, strings.Repeat("a", shift) + strings.Repeat(";", size/3), ""}})
			checkRoundTrip(t, before)
			if got, least := len(before.Encode()), size/maxPart+1; got < least {
				t.Errorf("%d bytes in %d variables, want at least %d", size, got, least)
			}
		}
	}
}

func TestTableGarbled(t *testing.T) {
	const header = variable
	const part = variable + "_0"
	for _, test := range []struct {
		story     string
		variables map[string]string
		want      string
	}{
		{"no header", map[string]string{part: "fd,a"}, "words"},
		{"empty header", map[string]string{header: ""}, "words"},
		{"random text", map[string]string{header: "what is this"}, "not a device and an inode"},
		{"NUL", map[string]string{header: "1 1:2 3:4 fds=0 parts=0 pid=1 until=2 token=\x00"}, "a NUL"},
		{"header too long", map[string]string{header: "1 1:2 3:4 fds=0 parts=0 pid=1 until=2 token=" + strings.Repeat("x", maxPart)}, "bytes"},
		{"header too short", map[string]string{header: "1 1:2 3:4 fds=0 parts=0 pid=1"}, "until"},
		{"no pipe", map[string]string{header: "1 12 3:4 fds=0 parts=0 pid=1 until=2"}, "not a device and an inode"},
		{"pipe is text", map[string]string{header: "1 1:a 3:4 fds=0 parts=0 pid=1 until=2"}, "pipes"},
		{"pipe is negative", map[string]string{header: "1 1:2 -3:4 fds=0 parts=0 pid=1 until=2"}, "pipes"},
		{"pipe is out of range", map[string]string{header: "1 1:2 3:18446744073709551616 fds=0 parts=0 pid=1 until=2"}, "out of range"},
		{"generation is text", map[string]string{header: "1 1:2 3:4 fds=0 parts=0 pid=1 until=2 generation=x"}, "generation"},
		{"count is text", map[string]string{header: "1 1:2 3:4 fds=x parts=0 pid=1 until=2"}, "invalid syntax"},
		{"count is negative", map[string]string{header: "1 1:2 3:4 fds=-1 parts=0 pid=1 until=2"}, "invalid syntax"},
		{"count is out of range", map[string]string{header: "1 1:2 3:4 fds=99999999999 parts=0 pid=1 until=2"}, "out of range"},
		{"parts out of range", map[string]string{header: "1 1:2 3:4 fds=0 parts=99999999999 pid=1 until=2"}, "out of range"},
		{"count too large", map[string]string{header: "1 1:2 3:4 fds=2 parts=1 pid=1 until=2", part: "fd,a"}, "2 descriptors announced, 1 found"},
		{"count too small", map[string]string{header: "1 1:2 3:4 fds=1 parts=1 pid=1 until=2", part: "fd,a;fd,b"}, "1 descriptors announced, 2 found"},
		{"count of zero", map[string]string{header: "1 1:2 3:4 fds=0 parts=1 pid=1 until=2", part: "fd,a"}, "no descriptors announced"},
		{"huge count", map[string]string{header: "1 1:2 3:4 fds=2147483647 parts=1 pid=1 until=2", part: "fd,a"}, "2147483647 descriptors announced, 1 found"},
		{"missing part", map[string]string{header: "1 1:2 3:4 fds=1 parts=1 pid=1 until=2"}, part + ", one of 1 parts, is missing"},
		{"missing second part", map[string]string{header: "1 1:2 3:4 fds=1 parts=2 pid=1 until=2", part: "fd,a"}, "_1, one of 2 parts, is missing"},
		{"huge number of parts", map[string]string{header: "1 1:2 3:4 fds=1 parts=2147483647 pid=1 until=2", part: "fd,a"}, "is missing"},
		{"broken escape", map[string]string{header: "1 1:2 3:4 fds=2 parts=1 pid=1 until=2", part: "fd,a;fd,%zz"}, "descriptor 1"},
		{"cut escape", map[string]string{header: "1 1:2 3:4 fds=1 parts=1 pid=1 until=2", part: "fd,%4"}, "descriptor 0"},
	} {
		t.Run(test.story, func(t *testing.T) {
			got, err := Decode(test.variables)
			if err == nil {
				t.Fatalf("accepted: %+v", got)
			}
			for _, want := range []string{"tableflip: ", variable, "unset it", test.want} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q lacks %q", err, want)
				}
			}
			var version UnknownVersionError
			if errors.As(err, &version) {
				t.Errorf("taken for version %q", version)
			}
		})
	}
}

// A later version of this package may say more, which is ignored.
func TestTableUnknownWords(t *testing.T) {
	got, err := Decode(map[string]string{
		variable:        "1 1:2 3:4 fds=1 new=a=b parts=1 pid=5 until=6 plain",
		variable + "_0": "fd,a,,,,,b,new,newer",
	})
	want := Table{
		Ready: PipeID{1, 2}, Verdict: PipeID{3, 4}, PID: 5, Until: time.UnixMilli(6),
		Entries: []*Entry{{Name: Name{File, "a", ""}, FDName: "b"}},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %s, %v; want %s", show(got), err, show(want))
	}
}

// Whatever another version writes after the pipes, it is told apart from a
// garbled table, and the pipes are readable.
func TestTableOtherVersion(t *testing.T) {
	for _, header := range []string{"2 1:2 3:4", "2 1:2 3:4 0 0", "2 1:2 3:4 ? any thing more"} {
		got, err := Decode(map[string]string{variable: header})
		var version UnknownVersionError
		if !errors.As(err, &version) {
			t.Errorf("%q: got %v, want an unknown version", header, err)
			continue
		}
		for _, want := range []string{`"2"`, `"1"`} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %q lacks %s", header, err, want)
			}
		}
		if want := (Table{Ready: PipeID{1, 2}, Verdict: PipeID{3, 4}}); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %+v, want %+v", header, got, want)
		}
	}
}

func allocatedBytes() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// FuzzDecode shows that no environment makes a process panic or fill its memory.
func FuzzDecode(f *testing.F) {
	for _, entries := range [][]Entry{nil, {{}}, {{Name{Listener, "tcp", ":0"}, "[::]:1", "/x", "1:2", "y"}, {}}, manyEntries(100, 3)} {
		env := environment(f, tableOf(entries...).Encode())
		f.Add(env[variable], env[variable+"_0"], "")
	}
	f.Add("1 1:2 3:4 fds=2147483647 parts=2 pid=1 until=2", "fd,a", ";;;;;")
	f.Add("1 1:2 3:4 fds=2147483647 parts=2147483647 pid=1 until=2", "", "")
	f.Add("2 1:2 3:4", "", "")
	f.Add("", "%", ",,,,,,")
	f.Fuzz(func(t *testing.T, header, first, second string) {
		before := allocatedBytes()
		got, err := Decode(map[string]string{
			variable:        header,
			variable + "_0": first,
			variable + "_1": second,
		})
		// The runtime counts by spans, so that a small input looks large.
		if used, limit := allocatedBytes()-before, uint64(1<<20+200*(len(header)+len(first)+len(second))); used > limit {
			t.Errorf("%d bytes allocated, want at most %d", used, limit)
		}
		if err == nil {
			checkRoundTrip(t, got)
		}
	})
}

// FuzzRoundTrip shows that names are arbitrary bytes.
func FuzzRoundTrip(f *testing.F) {
	f.Add(uint64(1), uint64(2), uint16(0), "", "", "", "", "", "", "")
	f.Add(uint64(1), uint64(2), uint16(1), "", "", "", "", "", "", "")
	f.Add(uint64(0), uint64(1<<63), uint16(3), "listener", "unix", "", "@0001", "", "", "")
	f.Add(uint64(8), uint64(9), uint16(40), "a b", ",;%+=&", "\x00\n\r", "\xff\xfe", "/ü", "a,b", "")
	f.Add(uint64(8), uint64(9), uint16(99), "conn", "tcp6", "[::1%lo]:1", strings.Repeat("\x00", 50), "", "", "")
	f.Fuzz(func(t *testing.T, device, inode uint64, count uint16, kind, network, addr, given, path, fileID, fdName string) {
		before := Table{Ready: PipeID{device, inode}, Verdict: PipeID{inode, device}, Until: time.UnixMilli(0)}
		for i := range count % 100 {
			// Rotated, so that each field is empty in some descriptors.
			fields := []string{kind, network, addr, given, path, fileID, fdName}
			at := int(i) % len(fields)
			fields = append(fields[at:], fields[:at]...)
			before.Entries = append(before.Entries,
				&Entry{Name{fields[0], fields[1], fields[2]}, fields[3], fields[4], fields[5], fields[6]})
		}
		checkRoundTrip(t, before)
	})
}
