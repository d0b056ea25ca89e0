//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"example.com/tableflip/internal/testbed/wire"
)

// build compiles the server that uses the given library, and returns its binary.
func build(ctx context.Context, library, dir string) ([]byte, error) {
	out := filepath.Join(dir, "server-built")
	args := []string{"build", "-ldflags", "-X main.version=" + wire.Placeholder, "-o", out}
	if library == cloudflare {
		args = append(args, "-tags", "cloudflare")
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "./server")...)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("building the server (run the test-bed in its own folder): %w", err)
	}
	binary, err := os.ReadFile(out)
	if err != nil {
		return nil, err
	}
	if !bytes.Contains(binary, []byte(wire.Placeholder)) {
		return nil, errors.New("the server's binary does not contain its version")
	}
	return binary, nil
}

// install puts version n of the binary at path, by a rename, because a running binary
// cannot be written to (ETXTBSY in open(2)).
func install(binary []byte, path string, n int) error {
	renamed := path + ".new"
	changed := bytes.ReplaceAll(binary, []byte(wire.Placeholder), []byte(wire.Version(n)))
	if err := os.WriteFile(renamed, changed, 0o755); err != nil {
		return err
	}
	return os.Rename(renamed, path)
}
