//go:build darwin || freebsd

package control

import "golang.org/x/sys/unix"

// peerOf returns the effective user of the process that has connected a socket: see
// getpeereid(3) and unix(4).
func peerOf(fd int) (uid int, known bool, err error) {
	peer, err := unix.GetsockoptXucred(fd, unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
	if err != nil {
		return 0, true, err
	}
	return int(peer.Uid), true, nil
}
