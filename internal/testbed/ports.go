//go:build linux

package main

import (
	"fmt"
	"math/rand/v2"
	"net"
)

// freeAddresses returns n loopback addresses that are free for TCP and UDP. Their
// ports are below those that the kernel gives to clients, so that nobody takes
// them while the server is being restarted after a crash.
func freeAddresses(n int) ([]string, error) {
	var addrs []string
	for tries := 0; len(addrs) < n; tries++ {
		if tries == 1000 {
			return nil, fmt.Errorf("no free ports")
		}
		addr := fmt.Sprintf("127.0.0.1:%d", 10000+rand.IntN(20000))
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			continue
		}
		conn, err := net.ListenPacket("udp", addr)
		ln.Close()
		if err != nil {
			continue
		}
		conn.Close()
		addrs = append(addrs, addr)
	}
	return addrs, nil
}
