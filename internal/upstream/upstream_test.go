package upstream

import (
	"bytes"
	"encoding/gob"
	"io"
	"slices"
	"strings"
	"testing"

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
	long := nametable.Name{Kind: nametable.File, Network: strings.Repeat("é", 200), Addr: ""}
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

func TestDecodeGarbled(t *testing.T) {
	complete := gobOf(t, samples()[2])
	for size := range complete {
		if names, err := Decode(bytes.NewReader(complete[:size])); err == nil {
			t.Errorf("%d of %d bytes became %v", size, len(complete), names)
		}
	}
	for _, value := range [][][]string{{{"fd", "a"}}, {{"fd", "a", "", ""}}, {nil}} {
		var b bytes.Buffer
		if err := gob.NewEncoder(&b).Encode(value); err != nil {
			t.Fatal(err)
		}
		if names, err := Decode(&b); err == nil {
			t.Errorf("%q became %v", value, names)
		}
	}
	for _, text := range []string{"\xf7\x01\x01\x01\x01\x01\x01\x01\x01", "\x80", "\xfb\x7f\xff\xff\xff\xff", "\x02\x02\x01"} {
		if names, err := Decode(strings.NewReader(text)); err == nil {
			t.Errorf("%q became %v", text, names)
		}
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
