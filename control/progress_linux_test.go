package control_test

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
)

// terminal returns both ends of one.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs pseudo-terminals: %v", err)
	}
	var number int
	raw := proctest.Must(master.SyscallConn())
	controlErr := raw.Control(func(fd uintptr) {
		err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0)
		if err == nil {
			number, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	})
	proctest.OK(t, errors.Join(err, controlErr))
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	proctest.OK(t, err)
	return master, slave
}

// On a terminal, and only there, an upgrade shows its steps.
func TestProgress(t *testing.T) {
	s := start(t)
	master, slave := terminal(t)
	output := proctest.NewOutput(t)
	go output.Read(master)

	c := s.prepareCtl("upgrade")
	c.cmd.Stdout, c.cmd.Stderr = slave, slave
	c.ended = s.Start(c.cmd)
	slave.Close()
	s.adopt()
	for _, step := range []string{" started ", " here ", " ready ", " committed ", "has taken over from "} {
		output.Await(step, fmt.Sprint(s.current.PID))
	}
	s.wantExit(c, 0)
	if output.Count("watching") != 0 {
		t.Error("the streams themselves are shown")
	}

	// Ctrl-C
	s.setFlaw("hang")
	c = s.prepareCtl("-wait", "upgrade")
	master, slave = terminal(t)
	output = proctest.NewOutput(t)
	go output.Read(master)
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = slave, slave, slave
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	c.ended = s.Start(c.cmd)
	slave.Close()
	child := s.Next()
	child.Await("hanging")
	output.Await(" started ")
	proctest.Must(master.WriteString("\x03"))
	child.AwaitEnd()
	output.Await("interrupted: upgrade is aborted")
	s.wantExit(c, 1)
}
