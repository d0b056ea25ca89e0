//go:build unix

// Command compat is a service written for github.com/cloudflare/tableflip. It uses
// every name of that package in the ways that its documentation shows. The tests
// here run it on tableflip itself and, with nothing but the import path changed, on
// this project's library.
//
//	compat DIRECTORY
//
// It keeps its Unix socket and its PID file in DIRECTORY, and tells on standard
// output, a line each, what it observes. SIGHUP upgrades it, SIGTERM stops it.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
)

// What the service passes on must be sharable.
var (
	_ tableflip.Listener   = (*net.TCPListener)(nil)
	_ tableflip.Listener   = (*net.UnixListener)(nil)
	_ tableflip.PacketConn = (*net.UDPConn)(nil)
	_ tableflip.PacketConn = (*net.UnixConn)(nil)
	_ tableflip.Conn       = (*net.TCPConn)(nil)
)

func main() {
	log.SetFlags(0)
	flag.Parse()
	if err := run(flag.Arg(0)); err != nil {
		log.Fatal(err)
	}
}

// tell tells the test what this generation observes.
func tell(format string, args ...any) {
	fmt.Printf(format+"\n", args...)
}

// phrase returns what tableflip says in err, which is all that its users can match
// on.
func phrase(err error) string {
	if err == nil {
		return "no error"
	}
	for _, phrase := range []string{"only a single", "not ready yet", "upgrade in progress", "parent hasn't exited"} {
		if strings.Contains(err.Error(), phrase) {
			return phrase
		}
	}
	return err.Error()
}

func run(directory string) error {
	upg, err := tableflip.New(tableflip.Options{
		UpgradeTimeout: min(30*time.Second, tableflip.DefaultUpgradeTimeout),
		PIDFile:        filepath.Join(directory, "pid"),
		ListenConfig:   &net.ListenConfig{KeepAlive: time.Minute},
	})
	if errors.Is(err, tableflip.ErrNotSupported) {
		return errors.New("this platform is not supported")
	}
	if err != nil {
		return err
	}
	defer upg.Stop()

	s := &service{Upgrader: upg, directory: directory}
	if err := s.open(); err != nil {
		return err
	}
	_, err = tableflip.New(tableflip.Options{})
	tell("a second New: %s", phrase(err))
	tell("Upgrade before Ready: %s", phrase(upg.Upgrade()))

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM)
	go func() {
		for sig := range signals {
			if sig == syscall.SIGTERM {
				upg.Stop()
				continue
			}
			if err := upg.Upgrade(); err != nil {
				tell("upgrade: %s", phrase(err))
			}
		}
	}()

	if err := upg.Ready(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := upg.WaitForParent(ctx); err != nil {
		return err
	}
	tell("has a parent: %t", upg.HasParent())
	tell("serving %d", os.Getpid())

	<-upg.Exit()
	// Why, tableflip says differently from run to run.
	tell("Upgrade after Exit fails: %t", upg.Upgrade() != nil)
	return nil
}

// service is the application: it answers every request with its generation.
type service struct {
	*tableflip.Upgrader
	directory  string
	generation int
}

// open takes over or creates all that the service serves.
func (s *service) open() error {
	if err := s.count(); err != nil {
		return err
	}
	if err := s.openListeners(); err != nil {
		return err
	}
	if err := s.openPacketConns(); err != nil {
		return err
	}
	return s.openConn()
}

// count keeps the number of the generation in a file that each generation passes on.
func (s *service) count() error {
	file, err := s.File("generation")
	if err != nil {
		return err
	}
	if file == nil {
		if file, err = os.CreateTemp(s.directory, "generation"); err != nil {
			return err
		}
		if err := os.Remove(file.Name()); err != nil {
			return err
		}
		if err := s.AddFile("generation", file); err != nil {
			return err
		}
		if err := s.AddFile("log", os.Stderr); err != nil {
			return err
		}
	} else {
		tell("the file's name: %s", file.Name())
	}
	defer file.Close()
	others, err := s.Files()
	if err != nil {
		return err
	}
	for _, other := range others {
		tell("another file's name: %s", other.Name())
		other.Close()
	}
	again, err := s.File("generation")
	tell("the file again: %v, %v", again, err)

	content, err := io.ReadAll(io.NewSectionReader(file, 0, 20))
	if err != nil {
		return err
	}
	s.generation, _ = strconv.Atoi(string(content))
	s.generation++
	_, err = file.WriteAt([]byte(strconv.Itoa(s.generation)), 0)
	return err
}

func (s *service) openListeners() error {
	tcp, err := s.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go s.accept(tcp)
	tell("addr tcp %s", tcp.Addr())

	unix, err := s.ListenWithCallback("unix", filepath.Join(s.directory, "listener"), func(network, addr string) (net.Listener, error) {
		tell("the callback listens")
		return net.Listen(network, addr)
	})
	if err != nil {
		return err
	}
	go s.accept(unix)
	tell("addr unix %s", unix.Addr())

	added, err := s.Listener("tcp", "added")
	if err != nil {
		return err
	}
	tell("the added listener was inherited: %t", added != nil)
	if added == nil {
		if added, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return err
		}
		if err := s.AddListener("tcp", "added", added.(tableflip.Listener)); err != nil {
			return err
		}
	}
	go s.accept(added)
	tell("addr added %s", added.Addr())
	return nil
}

func (s *service) openPacketConns() error {
	udp, err := s.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go s.reply(udp)
	tell("addr udp %s", udp.LocalAddr())

	called, err := s.ListenPacketWithCallback("udp", "localhost:0", func(network, _ string) (net.PacketConn, error) {
		tell("the packet callback listens")
		return net.ListenPacket(network, "127.0.0.1:0")
	})
	if err != nil {
		return err
	}
	go s.reply(called)
	tell("addr called %s", called.LocalAddr())

	added, err := s.PacketConn("udp", "added")
	if err != nil {
		return err
	}
	tell("the added packet conn was inherited: %t", added != nil)
	if added == nil {
		if added, err = net.ListenPacket("udp", "127.0.0.1:0"); err != nil {
			return err
		}
		if err := s.AddPacketConn("udp", "added", added.(tableflip.PacketConn)); err != nil {
			return err
		}
	}
	go s.reply(added)
	tell("addr addedpacket %s", added.LocalAddr())
	return nil
}

// openConn goes on with the connection that a client has asked to keep.
func (s *service) openConn() error {
	kept, err := s.Conn("tcp", "kept")
	if err != nil {
		return err
	}
	tell("the kept connection was inherited: %t", kept != nil)
	if kept != nil {
		go s.converse(kept, bufio.NewReader(kept))
	}
	return nil
}

func (s *service) accept(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			reader := bufio.NewReader(conn)
			if request, err := reader.ReadString('\n'); err == nil && request == "keep\n" {
				if err := s.AddConn("tcp", "kept", conn.(tableflip.Conn)); err != nil {
					tell("keep: %v", err)
				}
			}
			fmt.Fprintf(conn, "generation %d\n", s.generation)
			s.converse(conn, reader)
		}()
	}
}

// converse answers the requests on conn, which is left to the next generation
// when this one has none to answer.
func (s *service) converse(conn net.Conn, reader *bufio.Reader) {
	defer conn.Close()
	for {
		if _, err := reader.ReadString('\n'); err != nil {
			return
		}
		fmt.Fprintf(conn, "generation %d\n", s.generation)
	}
}

func (s *service) reply(conn net.PacketConn) {
	request := make([]byte, 64)
	for {
		_, from, err := conn.ReadFrom(request)
		if err != nil {
			return
		}
		conn.WriteTo(fmt.Appendf(nil, "generation %d\n", s.generation), from)
	}
}
