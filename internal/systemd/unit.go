package systemd

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// WatchesFirst reports whether systemd has started this process itself and can't learn of
// another main process, so that the unit ends with this process. If that is not certain,
// it returns false.
func (e Env) WatchesFirst() bool {
	return e.watchesFirst("/proc/self/cgroup", unitPath(os.Getuid()))
}

func (e Env) watchesFirst(cgroup string, unitPath []string) bool {
	if e["NOTIFY_SOCKET"] != "" || e["SYSTEMD_EXEC_PID"] != strconv.Itoa(os.Getpid()) {
		return false
	}
	unit := unitOf(cgroup)
	if unit == "" {
		return false
	}
	has, err := hasSetting(unitPath, unit, "PIDFile")
	return !has && err == nil
}

// unitOf returns the service in whose control group this process is.
func unitOf(cgroup string) string {
	content, _ := os.ReadFile(cgroup)
	for line := range strings.Lines(string(content)) {
		// HIERARCHY:CONTROLLERS:PATH (cgroups(7)). A unit may have groups of its own.
		_, group, _ := strings.Cut(strings.TrimSpace(line), "/")
		for group != "." {
			if unit := path.Base(group); strings.HasSuffix(unit, ".service") {
				return unit
			}
			group = path.Dir(group)
		}
	}
	return ""
}

// unitPath returns the directories in which systemd looks for units (systemd.unit(5)) of a
// user, as far as they do not depend on settings.
func unitPath(uid int) []string {
	dirs := []string{"/etc/systemd/system", "/run/systemd/system", "/run/systemd/transient", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}
	if uid == 0 {
		return dirs
	}
	if config, err := os.UserConfigDir(); err == nil {
		dirs = append(dirs, filepath.Join(config, "systemd/user"))
	}
	if runtime := os.Getenv("XDG_RUNTIME_DIR"); runtime != "" {
		dirs = append(dirs, filepath.Join(runtime, "systemd/user"), filepath.Join(runtime, "systemd/transient"))
	}
	return append(dirs, "/etc/systemd/user", "/run/systemd/user", "/usr/local/lib/systemd/user", "/usr/lib/systemd/user")
}

// hasSetting reports whether a unit's file or one of its drop-ins sets something. It
// returns an error if there is no file.
func hasSetting(dirs []string, unit, setting string) (bool, error) {
	names := []string{unit}
	if name, _, ok := strings.Cut(unit, "@"); ok {
		names = append(names, name+"@.service")
	}
	found := false
	for _, dir := range dirs {
		for _, name := range names {
			files := []string{filepath.Join(dir, name)}
			dropIns, _ := filepath.Glob(filepath.Join(dir, name+".d", "*.conf"))
			for _, file := range append(files, dropIns...) {
				has, err := fileHasSetting(file, setting)
				switch {
				case errors.Is(err, fs.ErrNotExist):
					continue
				case has || err != nil:
					return has, err
				}
				found = true
			}
		}
	}
	if !found {
		return false, fs.ErrNotExist
	}
	return false, nil
}

func fileHasSetting(file, setting string) (bool, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(content)) {
		name, value, _ := strings.Cut(line, "=")
		if strings.TrimSpace(name) == setting && strings.TrimSpace(value) != "" {
			return true, nil
		}
	}
	return false, nil
}
