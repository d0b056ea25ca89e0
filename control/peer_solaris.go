package control

import "golang.org/x/sys/unix"

// peerOf returns the effective user of the process that has connected a socket: see
// getpeerucred(3C).
func peerOf(fd int) (uid int, known bool, err error) {
	peer, err := unix.GetPeerUcred(uintptr(fd))
	if err != nil {
		return 0, true, err
	}
	return peer.Geteuid(), true, nil
}
