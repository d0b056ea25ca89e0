package upstream

import (
	"bytes"
	"encoding/gob"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"example.com/tableflip/internal/nametable"
)

// gobOf returns what cloudflare/tableflip sends.
func gobOf(t *testing.T, names []nametable.Name) []byte {
	t.Helper()
	var value [][]string
	for _, n := range names {
		value = append(value, []string{n.Kind, n.Network, n.Addr})
	}
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(value); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func samples() [][]nametable.Name {
	long := nametable.Name{Kind: nametable.File, Network: strings.Repeat("é", 200), Addr: strings.Repeat("a", 128)}
	return [][]nametable.Name{
		{},
		{{Kind: nametable.Listener, Network: "tcp", Addr: "127.0.0.1:0"}},
		{{}, {Kind: nametable.PacketConn, Network: "unixgram", Addr: "\x00\xff\n*"}, long},
		slices.Repeat([]nametable.Name{long}, 300),
		slices.Repeat([]nametable.Name{{Kind: nametable.Conn}}, 70_000),
	}
}

func TestEncode(t *testing.T) {
	for _, names := range samples() {
		encoded := Encode(names)
		var value [][]string
		if err := gob.NewDecoder(bytes.NewReader(encoded)).Decode(&value); err != nil {
			t.Fatal(err)
		}
		if len(value) != len(names) {
			t.Fatalf("%d names became %d", len(names), len(value))
		}
		for i, n := range names {
			if !slices.Equal(value[i], []string{n.Kind, n.Network, n.Addr}) {
				t.Errorf("%q became %q", n, value[i])
			}
		}
	}
}

func TestDecode(t *testing.T) {
	for _, names := range samples() {
		// What comes behind is not read.
		r := bytes.NewReader(append(gobOf(t, names), "more"...))
		got, err := Decode(io.MultiReader(r)) // hides the methods of a bytes.Reader
		if err != nil || got == nil || !slices.Equal(got, names) {
			t.Errorf("%d names became %d, %v", len(names), len(got), err)
		}
		if rest, _ := io.ReadAll(r); string(rest) != "more" {
			t.Errorf("%q is left", rest)
		}
	}
}

// A program that encodes other types before gives these other numbers.
func TestDecodeOtherNumbers(t *testing.T) {
	type other struct{ A map[string][][]int }
	var b bytes.Buffer
	encoder := gob.NewEncoder(&b)
	if err := encoder.Encode(other{}); err != nil {
		t.Fatal(err)
	}
	b.Reset()
	if err := encoder.Encode([][]string{{"fd", "a", ""}}); err != nil {
		t.Fatal(err)
	}
	names, err := Decode(&b)
	if want := []nametable.Name{{Kind: "fd", Network: "a"}}; err != nil || !slices.Equal(names, want) {
		t.Errorf("got %v, %v", names, err)
	}
}

// Numbers may be longer than they need to be.
func TestDecodeLongNumbers(t *testing.T) {
	const zeros = "\x00\x00\x00\x00\x00\x00\x00"
	for encoded, want := range map[string][]nametable.Name{
		"\xf8" + zeros + string(gobOf(t, samples()[1])): samples()[1],
		"\x0c\xff\x82\x00\xf8" + zeros + "\x00":         {},
	} {
		if names, err := Decode(strings.NewReader(encoded)); err != nil || !slices.Equal(names, want) {
			t.Errorf("%q became %q, %v", encoded, names, err)
		}
	}
}

// What is missing is no reason to take anything for complete.
func TestDecodeIncomplete(t *testing.T) {
	complete := gobOf(t, samples()[2])
	for size := range complete {
		for _, want := range []error{io.ErrUnexpectedEOF, os.ErrDeadlineExceeded} {
			r := io.MultiReader(bytes.NewReader(complete[:size]), iotest.ErrReader(want))
			if names, err := Decode(r); !errors.Is(err, want) {
				t.Errorf("%d of %d bytes became %v, %v", size, len(complete), names, err)
			}
		}
		if names, err := Decode(bytes.NewReader(complete[:size])); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d of %d bytes became %v, %v", size, len(complete), names, err)
		}
	}
}

func TestDecodeGarbled(t *testing.T) {
	for _, value := range [][][]string{{{"fd", "a"}}, {{"fd", "a", "", ""}}, {nil}} {
		var b bytes.Buffer
		if err := gob.NewEncoder(&b).Encode(value); err != nil {
			t.Fatal(err)
		}
		if names, err := Decode(&b); !errors.Is(err, errGarbled) {
			t.Errorf("%q became %v, %v", value, names, err)
		}
	}
	const names = "\xff\x82\x00" // how a message with names begins
	for _, text := range []string{
		"\x80", // the length of a length
		"\xf7\x01\x01\x01\x01\x01\x01\x01\x01",
		"\xfb\x7f\xff\xff\xff\xff", // a length
		"\xfc\x04\x00\x00\x01",
		"\x02\x02\x01",     // no value
		"\x03\x80\x00\x00", // the length of a type's number
		"\xff\x83\x80" + strings.Repeat("\x00", 128) + "\x00\x00", //
		"\x04\xff\x82\x01\x00",                  // a struct
		"\x03" + names,                          // no number of names
		"\x05" + names + "\x00\x00",             // something behind them
		"\x06" + names + "\x01\x03\x05",         // a longer text
		"\x08" + names + "\x01\x02\x00\x00\x00", // another number of texts
	} {
		r := io.MultiReader(strings.NewReader(text), iotest.ErrReader(errors.New("read on")))
		if names, err := Decode(r); !errors.Is(err, errGarbled) {
			t.Errorf("%q became %v, %v", text, names, err)
		}
	}
}

// The longest message is no garbled one.
func TestDecodeLong(t *testing.T) {
	long := errors.New("read on")
	if names, err := Decode(io.MultiReader(strings.NewReader("\xfc\x04\x00\x00\x00"), iotest.ErrReader(long))); !errors.Is(err, long) {
		t.Errorf("it became %v, %v", names, err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, names := range samples()[:3] {
		f.Add(Encode(names))
	}
	f.Fuzz(func(t *testing.T, encoded []byte) {
		names, err := Decode(bytes.NewReader(encoded))
		if err != nil {
			return
		}
		if got, err := Decode(bytes.NewReader(Encode(names))); err != nil || !slices.Equal(got, names) {
			t.Fatalf("%q became %q, %v", names, got, err)
		}
		if got, err := Decode(bytes.NewReader(gobOf(t, names))); err != nil || !slices.Equal(got, names) {
			t.Fatalf("%q became %q, %v", names, got, err)
		}
	})
}
