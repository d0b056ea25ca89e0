//go:build unix

package process

import (
	"os/exec"
	"strings"
)

// A rootDirectory is what a new process has as its root. It is empty if that is this
// process's.
type rootDirectory string

func rootDir(cmd *exec.Cmd) rootDirectory {
	if cmd.SysProcAttr == nil {
		return ""
	}
	return rootDirectory(strings.TrimSuffix(cmd.SysProcAttr.Chroot, "/"))
}

// file returns this process's path of what the new process calls path.
func (root rootDirectory) file(path string) string {
	if root == "" {
		return path
	}
	return string(root) + "/" + strings.TrimPrefix(path, "/")
}

// in returns words to follow a path that the new process has.
func (root rootDirectory) in() string {
	if root == "" {
		return ""
	}
	return " in " + string(root)
}

// pathOf returns the path of cmd's binary in its root directory.
func pathOf(cmd *exec.Cmd) string {
	if !strings.HasPrefix(cmd.Path, "/") && cmd.Dir != "" {
		return cmd.Dir + "/" + cmd.Path
	}
	return cmd.Path
}

// binaryPath is pathOf for this process.
func binaryPath(cmd *exec.Cmd) string { return rootDir(cmd).file(pathOf(cmd)) }

// attributes names what cmd changes that takes privileges.
func attributes(cmd *exec.Cmd) string {
	var names []string
	if cmd.SysProcAttr.Chroot != "" {
		names = append(names, "Chroot")
	}
	if cmd.SysProcAttr.Credential != nil {
		names = append(names, "Credential")
	}
	if names == nil {
		return "for example namespaces or a process group"
	}
	return strings.Join(names, ", ")
}
