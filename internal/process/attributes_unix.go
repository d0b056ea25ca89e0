//go:build unix

package process

import (
	"os/exec"
	"strings"
)

// A rootDirectory is the root directory of a new process. It is empty if this process has
// the same.
type rootDirectory string

func rootDir(cmd *exec.Cmd) rootDirectory {
	if cmd.SysProcAttr == nil {
		return ""
	}
	return rootDirectory(strings.TrimSuffix(cmd.SysProcAttr.Chroot, "/"))
}

// file returns the path by which this process knows the new process's path.
func (root rootDirectory) file(path string) string {
	if root == "" {
		return path
	}
	return string(root) + "/" + strings.TrimPrefix(path, "/")
}

// in returns words to follow a path of the new process.
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

// attributes names the changes of cmd that need privileges.
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
