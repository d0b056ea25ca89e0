package process

import (
	"errors"
	"os/exec"

	"golang.org/x/sys/unix"
)

// refuse returns an error for what would let the new process depend on this one, or
// hide its PID.
func refuse(cmd *exec.Cmd) error {
	attr := cmd.SysProcAttr
	switch {
	case attr == nil:
		return nil
	case attr.Pdeathsig != 0:
		return errors.New("tableflip: Options.Command set SysProcAttr.Pdeathsig, which would kill the new process when the thread that starts it ends: leave it out, and have the service manager kill what is left of a service")
	case (attr.Cloneflags|attr.Unshareflags)&unix.CLONE_NEWPID != 0:
		return errors.New("tableflip: Options.Command set CLONE_NEWPID: in a PID namespace of its own the new process would know itself as process 1, which is what its PID file and the service manager would be told; start the first generation in the namespace instead")
	case attr.Ptrace:
		return errors.New("tableflip: Options.Command set SysProcAttr.Ptrace, which would stop the new process before its first instruction")
	}
	return nil
}
