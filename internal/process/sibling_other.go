//go:build !linux

package process

import "os/exec"

// makeSibling leaves cmd a child of this process.
func makeSibling(cmd *exec.Cmd) (wait func() error) { return cmd.Wait }
