package registry

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"

	"example.com/tableflip/internal/descriptor"
)

// socketFiles is the one table of the files of Unix sockets, by absolute path, and
// of who created them. Who creates a socket's file unlinks it: this process, or the
// generation that is in charge for all of them.
type socketFiles struct {
	byPath map[string]*socketFile
}

// A socketFile is the file of one socket. Sockets whose file another has replaced
// have one that is no longer in the table.
type socketFile struct {
	info     fs.FileInfo // which inode it is
	byParent bool        // a parent created it, and not this process
}

// inherit returns the file of an inherited socket, or nil if path has none.
func (t *socketFiles) inherit(path string) *socketFile {
	if path == "" {
		return nil
	}
	info, err := os.Lstat(path)
	if err != nil {
		return nil
	}
	return t.put(path, &socketFile{info, true})
}

// find returns the path and the file of a socket of this process that is bound to
// name. An unbound or an abstract socket has no file. The requested address is
// where to look for a socket that was bound elsewhere and renamed into place.
func (t *socketFiles) find(name, requested string) (string, *socketFile) {
	if name == "" || strings.HasPrefix(name, "@") {
		return "", nil
	}
	for _, path := range []string{name, requested} {
		info, err := os.Lstat(path)
		if err != nil || info.Mode().Type() != fs.ModeSocket {
			continue
		}
		if !strings.HasPrefix(path, "/") {
			dir, err := os.Getwd()
			if err != nil {
				continue
			}
			// Not filepath.Join: it would resolve ".." without following links.
			path = dir + "/" + path
		}
		return path, t.put(path, &socketFile{info, false})
	}
	return "", nil
}

// put returns the file in the table that is the same as file, or adds file.
func (t *socketFiles) put(path string, file *socketFile) *socketFile {
	if known := t.byPath[path]; known != nil && os.SameFile(known.info, file.info) {
		return known
	}
	if t.byPath == nil {
		t.byPath = make(map[string]*socketFile)
	}
	t.byPath[path] = file
	return file
}

// exists reports whether file is there, and no other socket's has taken its place.
// While a socket is open its inode is not used again.
func (t *socketFiles) exists(path string, file *socketFile) bool {
	if file == nil || t.byPath[path] != file {
		return false
	}
	now, err := os.Lstat(path)
	return err == nil && os.SameFile(now, file.info)
}

// forget is for a path that no entry has any more.
func (t *socketFiles) forget(path string) { delete(t.byPath, path) }

func (t *socketFiles) unlink(path string, file *socketFile) error {
	if !t.exists(path, file) {
		return nil
	}
	delete(t.byPath, path)
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("tableflip: unlink the Unix socket %s: %w", path, err)
	}
	return nil
}

// An unlinker is a Unix listener, which unlinks its file when it is closed unless it
// is told not to.
type unlinker interface {
	SetUnlinkOnClose(bool)
}

// hasFile reports whether e's Unix socket file is there.
func (r *Registry) hasFile(e *entry) bool { return r.files.exists(e.Path, e.file) }

func (r *Registry) unlink(e *entry) error { return r.files.unlink(e.Path, e.file) }

// pathInUse reports whether the path is that of an entry.
func (r *Registry) pathInUse(path string) bool {
	return path != "" && slices.ContainsFunc(r.index.entries, func(e *entry) bool { return e.Path == path })
}

// createSocket creates a socket, in the place of a dead one if that has left its
// file.
func createSocket[T any](create func(ctx context.Context, network, addr string) (T, error), network, addr string) (T, error) {
	socket, err := create(context.Background(), network, addr)
	if descriptor.IsAddrInUse(err) && unlinkDead(network, addr) {
		socket, err = create(context.Background(), network, addr)
	}
	return socket, err
}

// unlinkDead unlinks the file of a Unix socket that no process has open. One
// that was killed leaves its file, and that of a failed upgrade must not fail the
// next one.
func unlinkDead(network, addr string) bool {
	info, err := os.Lstat(addr)
	if err != nil || info.Mode().Type() != fs.ModeSocket {
		return false
	}
	conn, err := net.Dial(network, addr)
	if err == nil {
		conn.Close()
		return false
	}
	return descriptor.IsRefused(err) && os.Remove(addr) == nil
}
