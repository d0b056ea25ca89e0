package load

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
)

// FreeAddresses returns n loopback addresses that are free for TCP and UDP. Their ports
// are below those that the kernel gives to clients, so that nobody takes them while a
// server restarts.
func FreeAddresses(n int) ([]string, error) {
	var addrs []string
	for range 1000 {
		if len(addrs) == n {
			return addrs, nil
		}
		addr := fmt.Sprintf("127.0.0.1:%d", 10000+rand.IntN(20000))
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			continue
		}
		defer ln.Close() // after all are found, because one could be found twice
		conn, err := net.ListenPacket("udp", addr)
		if err != nil {
			continue
		}
		conn.Close()
		addrs = append(addrs, addr)
	}
	return nil, errors.New("no free ports")
}
