package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// This file owns what this process was started with, from before the program could change
// it. Whatever main does to os.Args, PATH or the working directory, the next generation is
// started as this one was.

var (
	initialArgs                 = slices.Clone(os.Args)
	initialDir, initialDirErr   = findInitialDir()
	initialPath, initialPathErr = findInitialPath()
)

// Args returns the arguments that this process was started with.
func Args() []string { return slices.Clone(initialArgs) }

// Dir returns the working directory that this process was started in, by the name that it
// had then, so that each new process follows a symbolic link in it anew. It is empty if
// the name is not known.
func Dir() string { return initialDir }

// Path returns where the binary of this process was when it started. After a
// deployment that is the new binary.
func Path() (string, error) { return initialPath, initialPathErr }

// FromDir makes a path that was relative when this process started absolute.
func FromDir(path string) (string, error) {
	if strings.HasPrefix(path, "/") || path == "" {
		return path, nil
	}
	if initialDirErr != nil {
		return "", fmt.Errorf("tableflip: %q is relative, and the working directory was not known at the start: %w", path, initialDirErr)
	}
	// Not filepath.Join: it would resolve ".." without following links.
	return initialDir + "/" + path, nil
}

// findInitialDir names the working directory as whoever started this process did.
func findInitialDir() (string, error) {
	// Getwd prefers the name in PWD, if that is this directory's. Shells set it.
	dir, err := os.Getwd()
	if err != nil || dir == os.Getenv("PWD") || len(initialArgs) == 0 || !strings.HasPrefix(initialArgs[0], "/") {
		return dir, err
	}

	// Service managers do not set PWD, and the kernel knows only the name with all links
	// resolved: a release's directory where "current" was meant. The part of argv[0]
	// that leads to the same directory is the name that was meant.
	here, err := os.Stat(".")
	if err != nil {
		return dir, nil
	}
	for name := initialArgs[0]; name != "/"; {
		name = filepath.Dir(name)
		if info, err := os.Stat(name); err == nil && os.SameFile(info, here) {
			return name, nil
		}
	}
	return dir, nil
}

func findInitialPath() (string, error) {
	if len(initialArgs) == 0 || initialArgs[0] == "" {
		return "", errors.New("tableflip: this process was started without a name (argv[0] is empty): name the new binary by Options.Command")
	}
	name := initialArgs[0]
	if strings.Contains(name, "/") {
		return FromDir(name)
	}

	// A process can be started under any name (exec -a, systemd's ExecStart=@), and what
	// PATH has by that name can be another program.
	const remedy = "start the service by its path, or name the new binary by Options.Command"
	path, err := exec.LookPath(name)
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return "", fmt.Errorf("tableflip: find the new binary: %w; %s", err, remedy)
	}
	if path, err = FromDir(path); err != nil {
		return "", err
	}
	same, err := isRunning(path)
	if err != nil {
		return "", fmt.Errorf("tableflip: can't tell whether %s, which PATH has for %s, is this program: %w; %s", path, name, err, remedy)
	}
	if !same {
		return "", fmt.Errorf("tableflip: this process is called %s, and what PATH has by that name, %s, was another program when it started; %s", name, path, remedy)
	}
	return path, nil
}

// isRunning reports whether path is the file that this process executes.
func isRunning(path string) (bool, error) {
	// Where there is such a link, it leads to the file even if that was deleted.
	running, err := os.Stat("/proc/self/exe")
	if err != nil {
		executable, err := os.Executable()
		if err != nil {
			return false, err
		}
		if running, err = os.Stat(executable); err != nil {
			return false, err
		}
	}
	info, err := os.Stat(path)
	return err == nil && os.SameFile(info, running), err
}
