//go:build linux

// Package handover replaces one process after another, each of which hands its
// listeners to the next by this library, by github.com/cloudflare/tableflip, or by
// the least that could do the same (the floor), and times it.
package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"

	ours "example.com/tableflip"
	theirs "github.com/cloudflare/tableflip"
	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/step"
)

// This file is what runs in the processes of a chain. They are all of one binary,
// whoever hands over, so that starting one costs the same.

// A Contender is a way to hand listeners over to the next generation.
type Contender string

const (
	Ours      Contender = "ours"
	Tableflip Contender = "tableflip"
	Floor     Contender = "floor"
)

// Contenders are all of them. The first is the one that is compared to the others.
var Contenders = []Contender{Ours, Tableflip, Floor}

const (
	contenderVariable = "BENCHMARK_CONTENDER"
	countVariable     = "BENCHMARK_LISTENERS"
	hostVariable      = "BENCHMARK_HOST"
	drainingVariable  = "BENCHMARK_DRAINING"
	floorVariable     = "BENCHMARK_FLOOR"
)

// The commands on standard input.
const (
	commandUpgrade = 'u'
	commandCPU     = 'c'
)

// A Serving is what a generation says of itself once it is in charge.
type Serving struct {
	PID       int
	Inherited bool
	TCP, UDP  string // addresses

	// When Ready was called, and when it returned, by CLOCK_MONOTONIC.
	ready, served int64
}

// What a generation answers: that it serves, and that it was replaced.
const (
	servingFormat  = "serving %d %t %s %s %d %d\n"
	upgradedFormat = "upgraded %d %d %d\n" // when Upgrade was called, Exit closed, Upgrade returned
)

// Main is a generation, if the process was started as one by Start or an upgrade.
// Then it does not return.
func Main() {
	c := Contender(os.Getenv(contenderVariable))
	if c == "" {
		return
	}
	if err := generation(c); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", c, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// monotonic returns nanoseconds that all processes of the machine count alike.
func monotonic() int64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		panic(err)
	}
	return now.Nano()
}

// An upgrader is what a generation needs of a contender.
type upgrader interface {
	ListenWithCallback(network, addr string, callback func(network, addr string) (net.Listener, error)) (net.Listener, error)
	ListenPacketWithCallback(network, addr string, callback func(network, addr string) (net.PacketConn, error)) (net.PacketConn, error)
	HasParent() bool
	Ready() error
	WaitForParent(ctx context.Context) error
	Upgrade() error
	Exit() <-chan struct{}
	Stop()
}

func (c Contender) new(maxDraining int) (upgrader, error) {
	switch c {
	case Ours:
		return ours.New(ours.Options{MaxDraining: maxDraining})
	case Tableflip:
		upg, err := theirs.New(theirs.Options{})
		return patient{upg}, err
	case Floor:
		return newFloor(), nil
	}
	return nil, fmt.Errorf("no contender %q", c)
}

// generation is the life of one process: it takes its sockets, serves, and obeys.
func generation(c Contender) error {
	wantMarks()
	mark(MainCalled, monotonic())
	count, err := strconv.Atoi(os.Getenv(countVariable))
	if err != nil {
		return err
	}
	maxDraining, err := strconv.Atoi(os.Getenv(drainingVariable))
	if err != nil {
		return err
	}
	upg, err := c.new(maxDraining)
	if err != nil {
		return err
	}
	mark(NewReturned, monotonic())
	host := os.Getenv(hostVariable)
	listeners := make([]net.Listener, count)
	for i := range listeners {
		// The name has the shape of what most names are. The kernel chooses the
		// port, because this one may be taken.
		listeners[i], err = upg.ListenWithCallback("tcp", fmt.Sprintf("127.0.0.1:%d", 10000+i), func(network, _ string) (net.Listener, error) {
			return net.Listen(network, host+":0")
		})
		if err != nil {
			return err
		}
	}
	packets, err := upg.ListenPacketWithCallback("udp", "127.0.0.1:10000", func(network, _ string) (net.PacketConn, error) {
		return net.ListenPacket(network, host+":0")
	})
	if err != nil {
		return err
	}
	ready := monotonic()
	mark(ReadyCalled, ready)
	if err := upg.Ready(); err != nil {
		return err
	}
	served := monotonic()
	mark(ReadyReturned, served)
	accept := keep
	if maxDraining == 0 {
		accept = greet
		if err := upg.WaitForParent(context.Background()); err != nil {
			return err
		}
	}
	var accepting sync.WaitGroup
	accepting.Go(func() { accept(listeners[0]) })
	go echo(packets)
	fmt.Printf(servingFormat, os.Getpid(), upg.HasParent(), listeners[0].Addr(), packets.LocalAddr(), ready, served)
	tellMarks(newMarks)

	command := make([]byte, 1)
	for {
		if _, err := os.Stdin.Read(command); errors.Is(err, io.EOF) {
			upg.Stop()
			return nil
		} else if err != nil {
			return err
		}
		switch command[0] {
		case commandUpgrade:
			committed := make(chan int64, 1)
			go func() {
				<-upg.Exit()
				committed <- monotonic()
			}()
			called := monotonic()
			err := upg.Upgrade()
			returned := monotonic()
			if err != nil {
				return err
			}
			exited := <-committed
			fmt.Printf(upgradedFormat, called, exited, returned)
			mark(UpgradeCalled, called)
			mark(ExitClosed, exited)
			mark(UpgradeReturned, returned)
			tellMarks(oldMarks)
			// What it has accepted is its own to finish.
			listeners[0].Close()
			accepting.Wait()
			return nil
		case commandCPU:
			var usage syscall.Rusage
			if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
				return err
			}
			fmt.Printf("cpu %d\n", usage.Utime.Nano()+usage.Stime.Nano())
		default:
			return fmt.Errorf("no command %q", command)
		}
	}
}

// greet answers every connection by one byte.
func greet(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		conn.Write([]byte{'!'})
		conn.Close()
	}
}

// keep answers each byte on a connection by a line with the process ID, and returns when it
// can accept no more and the clients have ended all connections.
func keep(ln net.Listener) {
	var kept sync.WaitGroup
	defer kept.Wait()
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		kept.Go(func() {
			defer conn.Close()
			for question := make([]byte, 1); ; {
				if _, err := conn.Read(question); err != nil {
					return
				}
				fmt.Fprintln(conn, os.Getpid())
			}
		})
	}
}

// echo answers every datagram by itself.
func echo(packets net.PacketConn) {
	conn := packets.(*net.UDPConn)
	datagram := make([]byte, 64)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(datagram)
		if err != nil {
			return
		}
		conn.WriteToUDPAddrPort(datagram[:n], from)
	}
}

// patient is tableflip, whose Upgrade may say for a moment after Ready that the
// process is not ready, and after WaitForParent that the parent has not exited.
type patient struct {
	*theirs.Upgrader
}

func (p patient) Upgrade() error {
	for {
		err := p.Upgrader.Upgrade()
		if err == nil || !strings.Contains(err.Error(), "not ready yet") && !strings.Contains(err.Error(), "hasn't exited") {
			return err
		}
	}
}

// floor is the least that hands listeners over: it starts the binary with them,
// and waits until it has answered. It does not survive any error.
type floor struct {
	ready  *os.File // nil in the first generation
	parent *os.File
	next   uintptr        // the next inherited descriptor
	files  []*os.File     // what was inherited
	own    []syscall.Conn // what was not
	alive  *os.File       // ends with this process: the garbage collector must not close it
	exit   chan struct{}
}

// The descriptors of the floor's child.
const (
	floorReady = 3 + iota
	floorParent
	floorFirst
)

func newFloor() *floor {
	f := &floor{exit: make(chan struct{})}
	if _, inherited := os.LookupEnv(floorVariable); inherited {
		syscall.CloseOnExec(floorReady)
		syscall.CloseOnExec(floorParent)
		f.ready = os.NewFile(floorReady, "ready")
		f.parent = os.NewFile(floorParent, "parent")
		f.next = floorFirst
	}
	return f
}

func (f *floor) HasParent() bool { return f.ready != nil }

// inherit returns the next of the descriptors, whose order serves as their names.
func (f *floor) inherit() *os.File {
	syscall.CloseOnExec(int(f.next))
	file := os.NewFile(f.next, "")
	f.next++
	f.files = append(f.files, file)
	return file
}

func (f *floor) ListenWithCallback(network, addr string, callback func(network, addr string) (net.Listener, error)) (net.Listener, error) {
	if f.HasParent() {
		return net.FileListener(f.inherit())
	}
	ln, err := callback(network, addr)
	if err != nil {
		return nil, err
	}
	f.own = append(f.own, ln.(*net.TCPListener))
	return ln, nil
}

func (f *floor) ListenPacketWithCallback(network, addr string, callback func(network, addr string) (net.PacketConn, error)) (net.PacketConn, error) {
	if f.HasParent() {
		return net.FilePacketConn(f.inherit())
	}
	conn, err := callback(network, addr)
	if err != nil {
		return nil, err
	}
	f.own = append(f.own, conn.(*net.UDPConn))
	return conn, nil
}

func (f *floor) Ready() error {
	if !f.HasParent() {
		return nil
	}
	_, err := f.ready.Write([]byte{'!'})
	step.Reached(step.ReadySaid)
	return err
}

// WaitForParent waits for the end of a pipe that the parent does not close.
func (f *floor) WaitForParent(context.Context) error {
	if !f.HasParent() {
		return nil
	}
	_, err := io.Copy(io.Discard, f.parent)
	return err
}

func (f *floor) Upgrade() error {
	readyRead, readyWrite, err := os.Pipe()
	if err != nil {
		return err
	}
	parentRead, alive, err := os.Pipe()
	if err != nil {
		return err
	}
	f.alive = alive
	for _, socket := range f.own {
		file, err := duplicate(socket)
		if err != nil {
			return err
		}
		f.files = append(f.files, file)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), floorVariable+"=")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = append([]*os.File{readyWrite, parentRead}, f.files...)
	if err := cmd.Start(); err != nil {
		return err
	}
	step.Reached(step.ChildStarted)
	readyWrite.Close()
	_, err = readyRead.Read(make([]byte, 1))
	step.Reached(step.ReadyReceived)
	close(f.exit)
	return err
}

// duplicate does what the File method of a socket does. But os/exec would make a file
// of that method block, and the socket with it, and who calls Accept then is stuck.
func duplicate(socket syscall.Conn) (*os.File, error) {
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var dupErr error
	if err := raw.Control(func(s uintptr) { fd, dupErr = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, os.NewSyscallError("fcntl", dupErr)
	}
	return os.NewFile(uintptr(fd), ""), nil
}

func (f *floor) Exit() <-chan struct{} { return f.exit }

func (f *floor) Stop() {}
