package control

import "golang.org/x/sys/unix"

// peerOf returns the effective user of the process that has connected a socket: see
// unix(7).
func peerOf(fd int) (uid int, known bool, err error) {
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, true, err
	}
	return int(peer.Uid), true, nil
}
