package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/crypto/ssh"
)

// This file owns a connection: which sessions it has, and when it ends.

const (
	handshakeTimeout = 10 * time.Second
	grace            = 2 * time.Second // without a session, once the process is to exit
)

// serveConn returns when the connection is closed, by whomever.
func serveConn(nc net.Conn, config *ssh.ServerConfig, exit <-chan struct{}) {
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(handshakeTimeout))
	conn, channels, requests, err := ssh.NewServerConn(nc, config)
	if err != nil {
		return
	}
	nc.SetDeadline(time.Time{})
	defer conn.Close()
	go ssh.DiscardRequests(requests)

	sessions, served, leaving := 0, false, false
	ended := make(chan struct{})
	for {
		var silent <-chan time.Time
		if leaving && sessions == 0 {
			silent = time.After(grace)
		}
		select {
		case channel, ok := <-channels:
			switch {
			case !ok:
				for ; sessions > 0; sessions-- {
					<-ended
				}
				return
			case channel.ChannelType() != "session":
				channel.Reject(ssh.UnknownChannelType, "there are only sessions")
			case leaving && served:
				channel.Reject(ssh.ResourceShortage, "the process is about to exit: connect again")
			default:
				served = true
				sessions++
				go func() {
					serveSession(channel)
					ended <- struct{}{}
				}()
			}
		case <-ended:
			sessions--
		case <-exit:
			exit, leaving = nil, true
		case <-silent:
			return
		}
	}
}

// serveSession runs one command.
func serveSession(opened ssh.NewChannel) {
	channel, requests, err := opened.Accept()
	if err != nil {
		return
	}
	defer channel.Close()
	for request := range requests {
		var command struct{ Line string }
		if request.Type != "exec" || ssh.Unmarshal(request.Payload, &command) != nil {
			request.Reply(false, nil)
			continue
		}
		request.Reply(true, nil)
		go ssh.DiscardRequests(requests)
		status := run(command.Line, channel)
		channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{status}))
		return
	}
}

// run is the command: it says who it is, and sends its input back.
func run(line string, channel ssh.Channel) (status uint32) {
	fmt.Fprintf(channel, "version=%s pid=%d %s\n", version, os.Getpid(), line)
	if _, err := io.Copy(channel, channel); err != nil {
		return 1
	}
	return 0
}
