package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

const serverPackage = "example.com/tableflip/examples/http"

// build writes the server's binary of the given version to path. What go build
// keeps meanwhile is in the same folder, so that it goes with it.
func build(ctx context.Context, path, version string) error {
	goCommand, err := exec.LookPath("go")
	if err != nil {
		return fmt.Errorf("can't build the server: %w: install Go, or put its bin folder into PATH", err)
	}
	cmd := exec.CommandContext(ctx, goCommand, "build", "-o", path, "-ldflags=-X main.version="+version, serverPackage)
	cmd.Env = append(os.Environ(), "GOTMPDIR="+filepath.Dir(path))
	// go build starts compilers, which must not outlive it.
	inOwnGroup(cmd)
	cmd.Cancel = func() error { return killGroup(cmd.Process.Pid) }
	cmd.WaitDelay = 5 * time.Second
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("can't build the server: go build %s: %w (the demo must be run in the repository)\n%s", serverPackage, err, output)
	}
	return nil
}
