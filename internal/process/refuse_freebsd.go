package process

import (
	"errors"
	"os/exec"
)

// refuse returns an error for what would let the new process depend on this one.
func refuse(cmd *exec.Cmd) error {
	if cmd.SysProcAttr != nil && cmd.SysProcAttr.Pdeathsig != 0 {
		return errors.New("tableflip: Options.Command set SysProcAttr.Pdeathsig, which would kill the new process when this one ends: leave it out")
	}
	return nil
}
