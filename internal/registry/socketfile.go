package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"example.com/tableflip/internal/descriptor"
)

// socketFiles is the one table of the files of Unix sockets: which inode belongs to which
// socket, who created it, and how many entries use it. A process unlinks the files that it
// has created and, once it is in charge, those of all generations.
type socketFiles struct {
	byPath   map[string]*socketFile // the newest at each path
	inCharge bool
}

// A socketFile is the file of one socket.
type socketFile struct {
	path     string // absolute
	id       string // of its inode, which is not reused while the socket is open
	byParent bool   // a parent created it, and not this process
	users    int    // the entries that have it
}

// inherit returns the file of an inherited socket, or nil if path is empty. An empty
// id means that it is gone.
func (t *socketFiles) inherit(path, id string) *socketFile {
	if path == "" {
		return nil
	}
	return t.use(&socketFile{path: path, id: id, byParent: true})
}

// find returns the file of a socket of this process that is bound to name. An unbound
// or an abstract socket has none. The requested address is where to look for a socket
// that was bound elsewhere and renamed into place.
func (t *socketFiles) find(name, requested string) *socketFile {
	if !isPath(name) {
		return nil
	}
	for _, path := range []string{name, requested} {
		id, isSocket, _ := descriptor.IdentifyFile(path, false)
		if !isSocket {
			continue
		}
		if path, err := absolute(path); err == nil {
			return t.use(&socketFile{path: path, id: id})
		}
	}
	return nil
}

// restore returns the file of a socket that an earlier generation has stored with the
// service manager. name and requested mean the same as for find.
func (t *socketFiles) restore(name, requested string) *socketFile {
	file := t.find(name, requested)
	if file != nil {
		file.byParent = true
		return file
	}
	if path, err := absolute(name); err == nil && isPath(name) && (&socketFile{path: path}).isGone() {
		return t.inherit(path, "")
	}
	return nil
}

// use returns the file in the table that is the same as file, or adds file.
func (t *socketFiles) use(file *socketFile) *socketFile {
	if known := t.byPath[file.path]; known != nil && known.id == file.id {
		file = known
	}
	if t.byPath == nil {
		t.byPath = make(map[string]*socketFile)
	}
	t.byPath[file.path] = file
	file.users++
	return file
}

// release ends the use of a file by an entry. For the last entry it reports whether this
// process is to unlink the file.
func (t *socketFiles) release(file *socketFile) (unlinks bool) {
	if file == nil {
		return false
	}
	file.users--
	if file.users > 0 {
		return false
	}
	if t.byPath[file.path] == file {
		delete(t.byPath, file.path)
	}
	return (t.inCharge || !file.byParent) && file.exists()
}

// exists reports whether the file is there, and no other has taken its place.
func (f *socketFile) exists() bool {
	id, _, err := descriptor.IdentifyFile(f.path, false)
	return err == nil && id == f.id
}

// isGone reports whether no client can reach the socket any more. If not even the
// directory is there, this process sees other files than its clients do (chroot(2)).
func (f *socketFile) isGone() bool {
	id, _, err := descriptor.IdentifyFile(f.path, true)
	if errors.Is(err, fs.ErrNotExist) {
		_, err := os.Lstat(filepath.Dir(f.path))
		return err == nil
	}
	return err == nil && id != f.id
}

func (f *socketFile) unlink() error {
	if err := os.Remove(f.path); err != nil {
		return fmt.Errorf("tableflip: unlink the Unix socket %s: %w", f.path, err)
	}
	return nil
}

// isPath reports whether a Unix socket's address has a file: an unnamed or an
// abstract one has none.
func isPath(addr string) bool {
	return addr != "" && addr[0] != '@' && addr[0] != 0
}

func isUnix(network string) bool {
	return network == "unix" || network == "unixgram" || network == "unixpacket"
}

// absolute is not filepath.Abs, which resolves ".." without following links.
func absolute(path string) (string, error) {
	if strings.HasPrefix(path, "/") {
		return path, nil
	}
	dir, err := os.Getwd()
	return dir + "/" + path, err
}

// canonical returns the same spelling for all spellings of a path. The last element need
// not exist.
func canonical(path string) string {
	path, err := absolute(path)
	if err != nil {
		return path
	}
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		return resolved
	}
	dir, base := filepath.Split(path)
	if dir, err := filepath.EvalSymlinks(dir); err == nil {
		return filepath.Join(dir, base)
	}
	return path
}

// createSocket creates a socket. If a dead socket's file is at the path, it replaces it: a
// process that was killed leaves one, and the file of a failed upgrade must not make the
// next one fail.
func createSocket[T any](create func(ctx context.Context, network, addr string) (T, error), network, addr string) (T, error) {
	socket, err := create(context.Background(), network, addr)
	if !descriptor.IsAddrInUse(err) || !isUnix(network) || !isPath(addr) {
		return socket, err
	}
	// Others that start now have found it dead, too, and must look again once one has
	// replaced it.
	defer descriptor.LockDir(filepath.Dir(addr))()
	if unlinkDead(addr) {
		socket, err = create(context.Background(), network, addr)
	}
	return socket, err
}

// unlinkDead unlinks the file of a Unix socket that no process has open, and reports
// whether the path may be free now.
func unlinkDead(path string) bool {
	_, isSocket, err := descriptor.IdentifyFile(path, false)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist) // another process has unlinked it
	}
	return isSocket && descriptor.IsDead(path) && unlinkAside(path)
}

// unlinkAside is for a file that was just found dead. A process that does not call LockDir
// may have bound the path since, so the file is moved aside first. From then on it can't
// be confused with another, and its socket has been bound, because the kernel locks the
// directory from the file's creation until then (unix_bind_bsd). If the socket is not
// dead after all, the file is put back.
func unlinkAside(path string) bool {
	// Hardly longer than the path, because a socket's is limited to about 100 bytes.
	aside := fmt.Sprintf("%s/.%07x", filepath.Dir(path), rand.Uint32()>>4)
	if err := os.Rename(path, aside); err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	if descriptor.IsDead(aside) {
		return os.Remove(aside) == nil
	}

	// Not by rename(2), which would replace a third socket's file.
	if err := os.Link(aside, path); err == nil || errors.Is(err, fs.ErrExist) {
		_ = os.Remove(aside)
	} else {
		_ = os.Rename(aside, path)
	}
	return false
}

// An unlinker is a Unix listener, which unlinks its file when it is closed unless it
// is told not to.
type unlinker interface {
	SetUnlinkOnClose(bool)
}

// leaveFile gives the owner of a socket the duty to unlink its file back. If the owner has
// closed the socket already, leaveFile unlinks the file itself.
func leaveFile(file *socketFile, owner syscall.Conn) error {
	if u, ok := owner.(unlinker); ok {
		u.SetUnlinkOnClose(true)
	}
	if err := descriptor.Control(owner, func(uintptr) error { return nil }); descriptor.IsClosed(err) {
		return file.unlink()
	}
	return nil
}
