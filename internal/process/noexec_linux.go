package process

import "golang.org/x/sys/unix"

// isNoexec reports whether no file there can be executed.
func isNoexec(path string) bool {
	var stat unix.Statfs_t
	return unix.Statfs(path, &stat) == nil && uint64(stat.Flags)&unix.ST_NOEXEC != 0
}
