//go:build unix

package process

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// This file owns the advice for the reader of an error. The system calls that start a
// process, such as execve(2) and chdir(2), have few errors for many causes, and os/exec
// reports all of them with the binary's name. So the cause is looked up.

func isBusy(err error) bool { return errors.Is(err, unix.ETXTBSY) }

func isNoChild(err error) bool { return errors.Is(err, unix.ECHILD) }

// startHint returns advice for the reader of err, which came from starting cmd. It is
// empty if the error says everything.
func startHint(cmd *exec.Cmd, err error) string {
	switch {
	case isBusy(err):
		return "; write the new binary beside the old one and rename it into place"
	case errors.Is(err, unix.E2BIG):
		return "; the environment, with the names of the descriptors in it, is larger than this system passes on: pass on fewer descriptors, use shorter names, or raise the stack limit (ulimit -s), which on Linux bounds it"
	case errors.Is(err, unix.EAGAIN):
		return "; raise the limit of processes (ulimit -u, TasksMax=, pids.max of the container)"
	case errors.Is(err, unix.ENOMEM):
		return "; there is not enough memory for another process"
	case errors.Is(err, unix.EPERM):
		return privilegeHint(cmd)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EACCES), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOEXEC):
		return placeHint(cmd, err)
	}
	return LimitHint(err)
}

// LimitHint is startHint for errors of opening a file.
func LimitHint(err error) string {
	switch {
	// dup2(2) calls a number above the limit a bad descriptor.
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.EBADF):
		return "; raise the limit of open files (ulimit -n, LimitNOFILE=)"
	case errors.Is(err, unix.ENFILE):
		return "; this system has as many open files as it allows (on Linux: fs.file-max)"
	}
	return ""
}

// exitHint returns what is wrong with the binary of a process that was started and died.
// The kernel starts a truncated binary, too.
func exitHint(path string) string {
	if elf := readELF(path); elf.magic && elf.truncated {
		return "; " + truncatedHint(path)
	}
	return ""
}

func truncatedHint(path string) string {
	return path + " is incomplete: copy it again (is the disk full?), beside the old one, and rename it into place"
}

func privilegeHint(cmd *exec.Cmd) string {
	if cmd.SysProcAttr == nil {
		return "; a security policy (seccomp, SELinux, AppArmor) forbids it to this process"
	}
	return "; this user may not do what Options.Command set in SysProcAttr (" + attributes(cmd) + "): leave it out, or give this process the capability"
}

// placeHint checks each place that the start of a process needs, in the order in which the
// kernel does.
func placeHint(cmd *exec.Cmd, err error) string {
	root := rootDir(cmd)
	if root != "" {
		if hint := directoryHint(string(root), "the directory of SysProcAttr.Chroot, ", "leave out Chroot"); hint != "" {
			return "; " + hint
		}
	}
	if cmd.Dir != "" {
		if hint := directoryHint(root.file(cmd.Dir), "the working directory ", "choose another by Options.Command (if it was meant by a link that leads elsewhere now, the variable PWD can name that: PWD=/srv/current)"); hint != "" {
			return "; " + hint
		}
	}
	path := pathOf(cmd)
	if hint := binaryHint(root, path, err); hint != "" {
		return "; " + hint
	}
	if cmd.SysProcAttr != nil && cmd.SysProcAttr.Credential != nil {
		return fmt.Sprintf("; user %d, whom Options.Command chose, may not enter %s or execute %s", cmd.SysProcAttr.Credential.Uid, cmp.Or(cmd.Dir, "the working directory"), path)
	}
	return "; a security policy (SELinux, AppArmor) may forbid it to this user"
}

// directoryHint returns what is wrong with a directory that is to be entered.
func directoryHint(dir, name, other string) string {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "create " + name + dir + " again, or " + other
	case err == nil && !info.IsDir(), errors.Is(err, unix.ENOTDIR):
		return name + dir + " is not a directory: make it one, or " + other
	case errors.Is(err, unix.ELOOP):
		return name + dir + " is a link that leads to itself: mend it, or " + other
	case err != nil, unix.Access(dir, unix.X_OK) != nil:
		return "this user may not enter " + name + dir + ": allow it (chmod +x, on each part of the path), or " + other
	}
	return ""
}

// binaryHint returns what is wrong with a binary, which is path under root.
func binaryHint(root rootDirectory, path string, err error) string {
	file := root.file(path)
	info, statErr := os.Stat(file)
	switch {
	case errors.Is(statErr, fs.ErrNotExist):
		if target, err := os.Readlink(file); err == nil {
			return path + " is a link to " + target + ", which is missing" + root.in() + ": put the new binary there"
		}
		return "put the new binary, built by go build and not started by go run, where the old one was" + root.in() + ", or name it by Options.Command"
	case errors.Is(statErr, unix.ELOOP):
		return path + " is a link that leads to itself: put the new binary in its place"
	case errors.Is(statErr, unix.ENOTDIR):
		return "a part of that path is not a directory: put the new binary where the old one was, or name it by Options.Command"
	case errors.Is(statErr, fs.ErrPermission):
		return "this user may not search a directory of that path: allow it (chmod +x)"
	case statErr != nil:
		return statErr.Error()
	case info.IsDir():
		return path + " is a directory: put the new binary in its place, or name it by Options.Command"
	case !info.Mode().IsRegular():
		return path + " is not a regular file: put the new binary in its place"
	}

	interpreter := readInterpreter(file)
	switch {
	case errors.Is(err, unix.EACCES):
		return permissionHint(root, path, info, interpreter)
	case errors.Is(err, unix.ENOEXEC):
		return formatHint(file, path, info)
	case interpreter != "":
		return fmt.Sprintf("the binary is there: install the interpreter that it names, %q%s, or correct its first line", interpreter, root.in())
	}
	return "the binary is there: install the loader (ld.so) and the C library that it was built for" + root.in() + ", or build it with CGO_ENABLED=0"
}

func permissionHint(root rootDirectory, path string, info fs.FileInfo, interpreter string) string {
	file := root.file(path)
	switch {
	case info.Mode()&0o111 == 0, unix.Access(file, unix.X_OK) != nil && !isNoexec(file):
		return "make " + path + " executable for this user (chmod +x)"
	case isNoexec(file):
		return path + " is on a file system that is mounted noexec: put the new binary elsewhere, or mount that without noexec"
	case interpreter != "":
		if info, err := os.Stat(root.file(interpreter)); err == nil {
			return permissionHint(root, interpreter, info, "")
		}
	}
	return ""
}

// formatHint is for files that the kernel does not know how to execute.
func formatHint(file, path string, info fs.FileInfo) string {
	elf := readELF(file)
	system := runtime.GOOS + "/" + runtime.GOARCH
	switch {
	case info.Size() == 0:
		return path + " is empty: copy it again (is the disk full?), beside the old one, and rename it into place"
	case elf.truncated:
		return truncatedHint(path)
	case elf.magic, unix.Access(file, unix.R_OK) != nil:
		return path + " is not a program for this system: build the new binary for " + system
	}
	return path + " is neither a script that begins with #! nor a program of this system: build the new binary for " + system
}

// readInterpreter returns what the first line of a script names.
func readInterpreter(path string) string {
	head := make([]byte, 256)
	n := readStart(path, head)
	line, found := strings.CutPrefix(string(head[:n]), "#!")
	if !found {
		return ""
	}
	line, _, _ = strings.Cut(line, "\n")
	interpreter, _, _ := strings.Cut(strings.Trim(line, " \t"), " ")
	return interpreter
}

// IsMounted reports whether err, which came from replacing or removing a file, says
// that something is mounted on it.
func IsMounted(err error) bool { return errors.Is(err, unix.EBUSY) }
