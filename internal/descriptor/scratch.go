package descriptor

import "os"

// A Scratch is a file that refers to one descriptor after the other, which saves creating
// and polling a file for each. Its zero value is closed.
type Scratch struct {
	file *os.File
}

// File returns the file of s, which refers to the same open file as fd until the next
// call, and must not be closed. The network poller does not watch it.
func (s *Scratch) File(fd uintptr) (*os.File, error) {
	if s.file == nil {
		file, err := openBlocking()
		if err != nil {
			return nil, err
		}
		s.file = file
	}
	err := Control(s.file, func(target uintptr) error { return Replace(target, fd) })
	return s.file, err
}

// openBlocking returns a file in blocking mode, which os.NewFile does not register with
// the network poller. It is a pipe, because that needs no file system.
func openBlocking() (*os.File, error) {
	pipe, other, err := Pipe()
	if err != nil {
		return nil, err
	}
	_ = Close(other)
	return os.NewFile(pipe, ""), nil
}

// Close closes what s refers to.
func (s *Scratch) Close() error {
	if s.file == nil {
		return nil
	}
	file := s.file
	s.file = nil
	return file.Close()
}
