//go:build unix

package tableflip_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/httpdrain"
)

// A whole HTTP service by hand: SIGHUP upgrades it, SIGTERM and Ctrl-C stop it. Package
// service does the same in one call.
func Example() {
	upg, err := tableflip.New(tableflip.Options{PIDFile: "/run/service.pid"})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()

	// Before Ready, so that no signal ends the process in between.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, os.Interrupt)
	go func() {
		for sig := range signals {
			if sig != syscall.SIGHUP {
				upg.Stop()
				continue
			}
			// In a goroutine of its own, so that a signal to stop is heard.
			go func() {
				if err := upg.Upgrade(); err != nil {
					log.Println("upgrade failed:", err)
				}
			}()
		}
	}()

	ln, err := upg.Listen("tcp", "localhost:8080")
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: http.NotFoundHandler()}
	drainer := httpdrain.New(server)

	// Serve after Ready: what a child accepts is lost if its parent then refuses it.
	// Until then connections wait in the queue.
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	go func() {
		if err := drainer.Serve(ln); err != http.ErrServerClosed {
			log.Println("serve:", err)
			upg.Stop()
		}
	}()
	<-upg.Exit()

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	drainer.Replaced = upg.Replaced()
	if err := drainer.Shutdown(ctx); err != nil {
		log.Println("drain:", err)
	}
}

// A TCP server accepts until Exit is closed. Whoever connects later is accepted by
// the new process, from the same queue.
func ExampleFds_Listen() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()
	ln, err := upg.Listen("tcp", "localhost:0")
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return // ln was closed
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	}()

	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Fprintln(conn, "hello")
	line, _ := bufio.NewReader(conn).ReadString('\n')
	fmt.Print(line)
	conn.Close()
	// Output: hello
}

// A listener that needs options of its own is created by a callback, unless it was
// inherited. Options.ListenConfig does the same for all of them.
func ExampleFds_ListenWithCallback() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()
	var config net.ListenConfig
	config.SetMultipathTCP(false) // the socket keeps that
	ln, err := upg.ListenWithCallback("tcp", "localhost:0", func(network, addr string) (net.Listener, error) {
		return config.Listen(context.Background(), network, addr)
	})
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	fmt.Println(ln.Addr().Network())
	// Output: tcp
}

// A socket stays in the multicast groups that a generation has joined with it. The next
// one is told so if it joins again.
func ExampleFds_ListenPacket() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()
	conn, err := upg.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	// Or JoinGroup of golang.org/x/net/ipv4.
	raw, err := conn.(tableflip.PacketConn).SyscallConn()
	if err != nil {
		log.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		group := &syscall.IPMreq{Multiaddr: [4]byte{239, 1, 2, 3}, Interface: [4]byte{127, 0, 0, 1}}
		err = syscall.SetsockoptIPMreq(int(fd), syscall.IPPROTO_IP, syscall.IP_ADD_MEMBERSHIP, group)
	})
	if err != nil && !errors.Is(err, syscall.EADDRINUSE) {
		log.Fatal(err)
	}
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
}

// A listener that another package created is passed on under any name.
func ExampleFds_AddListener() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()

	ln, err := upg.Listener("activated", "www")
	if err != nil {
		log.Fatal(err)
	}
	if ln == nil { // the first generation
		if ln, err = activated("www"); err != nil {
			log.Fatal(err)
		}
		if err := upg.AddListener("activated", "www", ln.(tableflip.Listener)); err != nil {
			log.Fatal(err)
		}
	}
	defer ln.Close()
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	fmt.Println("listening")
	// Output: listening
}

// activated stands for a package that returns listeners by name.
func activated(string) (net.Listener, error) {
	return net.Listen("tcp", "localhost:0")
}

// An open file is passed on with its offset and its flock(2) locks.
func ExampleFds_AddFile() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()

	journal, err := upg.File("journal")
	if err != nil {
		log.Fatal(err)
	}
	if journal == nil { // the first generation
		journal, err = os.Create(filepath.Join(os.TempDir(), fmt.Sprintf("journal-%d", os.Getpid())))
		if err != nil {
			log.Fatal(err)
		}
		defer os.Remove(journal.Name())
		if err := upg.AddFile("journal", journal); err != nil {
			log.Fatal(err)
		}
	}
	defer journal.Close()
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	fmt.Fprintln(journal, "serving")
	fmt.Println("journal open")
	// Output: journal open
}

// A connection, here to a backend, is passed on. What this generation has read from it is
// not, so the next one must not need that.
func ExampleFds_AddConn() {
	backend, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		log.Fatal(err)
	}
	defer backend.Close()

	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()

	conn, err := upg.Conn("tcp", "backend")
	if err != nil {
		log.Fatal(err)
	}
	if conn == nil { // the first generation
		conn, err = net.Dial("tcp", backend.Addr().String())
		if err != nil {
			log.Fatal(err)
		}
		if err := upg.AddConn("tcp", "backend", conn.(tableflip.Conn)); err != nil {
			log.Fatal(err)
		}
	}
	defer conn.Close()
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	fmt.Println("connected")
	// Output: connected
}

// The new process can be another binary and get other arguments, another environment and
// other output.
func ExampleOptions() {
	upg, err := tableflip.New(tableflip.Options{
		UpgradeTimeout: 10 * time.Second,
		Command: func(cmd *exec.Cmd) {
			cmd.Path = "/opt/service/current/bin/service"
			cmd.Env = append(cmd.Env, "STARTED_BY=upgrade")
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()
	fmt.Println(upg.HasParent())
	// Output: false
}

// A process that prepares something heavy may wait until its parent is gone.
func ExampleUpgrader_WaitForParent() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer upg.Stop()
	if err := upg.Ready(); err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := upg.WaitForParent(ctx); err != nil {
		log.Println("the parent is still draining:", err)
	}
	fmt.Println("alone")
	// Output: alone
}
