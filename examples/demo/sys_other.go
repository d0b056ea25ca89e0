//go:build !unix

package main

import (
	"errors"
	"os"
	"os/exec"
)

// main says that upgrades are not supported here, and nothing else is reached.

const supported = false

var endSignals = []os.Signal{os.Interrupt}

func surviveBrokenPipe()       {}
func inOwnGroup(*exec.Cmd)     {}
func terminateGroup(int) error { return errors.ErrUnsupported }
func killGroup(int) error      { return errors.ErrUnsupported }
func running(int) bool         { return false }
