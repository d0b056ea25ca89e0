//go:build unix

package process

import (
	"encoding/binary"
	"io"
	"os"
)

// An elfFile says what is wrong with a program in the format that all Unix systems except
// macOS and AIX use (elf(5)). Package debug/elf knows more, but would add its readers of
// debugging information to every service.
type elfFile struct {
	magic     bool // it is one, or the beginning of one
	truncated bool // it ends before what its header promises does
}

const elfMagic = "\x7fELF"

func readELF(path string) (elf elfFile) {
	file, err := os.Open(path)
	if err != nil {
		return elf
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return elf
	}
	size := uint64(info.Size())

	header := make([]byte, 64) // the least that the kernel accepts
	n, _ := file.ReadAt(header, 0)
	if n < len(elfMagic) || string(header[:len(elfMagic)]) != elfMagic {
		return elf
	}
	elf.magic = true
	if n < 52 || n < 64 && header[4] == 2 {
		elf.truncated = true
		return elf
	}

	var order binary.ByteOrder = binary.LittleEndian
	if header[5] == 2 {
		order = binary.BigEndian
	}
	// The program headers say which parts of the file are loaded.
	var offset, entrySize, count uint64
	if header[4] == 2 {
		offset, entrySize, count = order.Uint64(header[32:]), uint64(order.Uint16(header[54:])), uint64(order.Uint16(header[56:]))
	} else {
		offset, entrySize, count = uint64(order.Uint32(header[28:])), uint64(order.Uint16(header[42:])), uint64(order.Uint16(header[44:]))
	}
	if entrySize < 32 || entrySize < 56 && header[4] == 2 || entrySize*count > 1<<16 {
		return elf // nothing that Linux would load
	}
	entries := make([]byte, entrySize*count)
	if _, err := io.ReadFull(io.NewSectionReader(file, int64(offset), int64(len(entries))), entries); err != nil {
		elf.truncated = true
		return elf
	}
	for ; len(entries) > 0; entries = entries[entrySize:] {
		var begin, length uint64
		if header[4] == 2 {
			begin, length = order.Uint64(entries[8:]), order.Uint64(entries[32:])
		} else {
			begin, length = uint64(order.Uint32(entries[4:])), uint64(order.Uint32(entries[16:]))
		}
		const load = 1
		if order.Uint32(entries) == load && (begin > size || length > size-begin) {
			elf.truncated = true
		}
	}
	return elf
}

// readStart fills head from the beginning of a file, and returns how much there was.
func readStart(path string, head []byte) int {
	file, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer file.Close()
	n, _ := io.ReadFull(file, head)
	return n
}
