//go:build linux

package main

import (
	"log/slog"
	"os"
	"syscall"

	"example.com/tableflip/internal/testbed/wire"
)

// fault is what this process is to suffer; the zero value is nothing.
type fault struct{ wire.Fault }

func readFault(path string) fault {
	text, err := os.ReadFile(path)
	if err != nil {
		return fault{}
	}
	f, err := wire.ParseFault(string(text))
	if err != nil {
		panic(err)
	}
	return fault{f}
}

// at is called at each step. It lets the fault happen if that is its step.
func (f fault) at(step string) {
	if f.Step != step {
		return
	}
	slog.Warn("injected fault", "fault", f.String())
	switch f.Action {
	case wire.Crash:
		panic("injected crash")
	case wire.ExitZero:
		os.Exit(0)
	case wire.Kill:
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case wire.Hang:
		select {}
	case wire.Suspend:
		report(wire.Stopping, nil)
		syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	case wire.KillParent:
		report(wire.KillingParent, nil)
		syscall.Kill(os.Getppid(), syscall.SIGKILL)
	default:
		panic("unknown fault " + f.String())
	}
}
