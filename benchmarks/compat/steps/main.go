//go:build unix

// Command steps is a service that fails as it is told to, on either library.
//
//	steps DIRECTORY
//
// It serves its PID on a Unix socket in DIRECTORY, where it has its PID file, and tells
// what it does on standard output. The file fault there says what it is to do at which
// step, a line each, for example "new exit". SIGHUP upgrades it, and SIGTERM stops it.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
)

func main() {
	log.SetFlags(0)
	if err := run(os.Args[1]); err != nil {
		tell("error: %v", err)
		os.Exit(1)
	}
}

// tell tells the test what this process does.
func tell(format string, args ...any) {
	fmt.Printf("%d %s\n", os.Getpid(), fmt.Sprintf(format, args...))
}

func run(directory string) error {
	var upg *tableflip.Upgrader
	at := func(step string) {
		content, _ := os.ReadFile(filepath.Join(directory, "fault"))
		var fault string
		for line := range strings.Lines(string(content)) {
			if faultStep, action, _ := strings.Cut(strings.TrimSpace(line), " "); faultStep == step {
				fault = action
			}
		}
		if fault == "" {
			return
		}
		tell("at %s", step)
		switch fault {
		case "exit":
			os.Exit(7)
		case "kill":
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
		case "hang":
			select {}
		case "stop":
			upg.Stop()
			os.Exit(8)
		case "subprocess":
			path, _ := os.ReadFile(filepath.Join(directory, "subprocess"))
			cmd := exec.Command(string(path), directory+"/sub")
			cmd.Stdout = os.Stdout
			if err := cmd.Start(); err != nil {
				tell("subprocess: %v", err)
			}
		case "wait":
			for {
				if _, err := os.Stat(filepath.Join(directory, "go")); err == nil {
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
		}
	}
	timeout, err := time.ParseDuration(os.Getenv("STEPS_TIMEOUT"))
	if err != nil {
		return err
	}

	at("start")
	upg, err = tableflip.New(tableflip.Options{
		UpgradeTimeout: timeout,
		PIDFile:        filepath.Join(directory, "pid"),
	})
	if err != nil {
		return err
	}
	at("new")
	ln, err := upg.Listen("unix", filepath.Join(directory, "listener"))
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM)
	go func() {
		for sig := range signals {
			switch sig {
			case syscall.SIGTERM:
				upg.Stop()
			default:
				tell("upgrade: %v", upg.Upgrade())
			}
		}
	}()
	at("listen")
	if err := upg.Ready(); err != nil {
		return err
	}
	at("ready")
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(conn, os.Getpid())
			conn.Close()
		}
	}()
	go func() {
		<-upg.Exit()
		ln.Close()
		tell("draining")
	}()
	tell("serving")
	at("serving")
	if err := upg.WaitForParent(context.Background()); err != nil {
		return err
	}
	tell("alone, has parent: %t", upg.HasParent())
	<-upg.Exit()
	at("exit")
	return nil
}
