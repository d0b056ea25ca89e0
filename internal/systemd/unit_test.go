//go:build unix

package systemd

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
)

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestUnitOf(t *testing.T) {
	for _, test := range []struct{ cgroup, want string }{
		{"0::/system.slice/web.service\n", "web.service"},
		{"0::/system.slice/system-web.slice/web@1.service\n", "web@1.service"},
		{"0::/system.slice/web.service/workers/3\n", "web.service"},
		{"0::/user.slice/user-0.slice/user@0.service/app.slice/web.service\n", "web.service"},
		{"12:pids:/\n1:name=systemd:/system.slice/web.service\n0::/\n", "web.service"},
		{"0::/user.slice/user-0.slice/session-1.scope\n", ""},
		{"0::/\n", ""},
		{"", ""},
	} {
		file := filepath.Join(t.TempDir(), "cgroup")
		write(t, file, test.cgroup)
		if got := unitOf(file); got != test.want {
			t.Errorf("%q: got %q, want %q", test.cgroup, got, test.want)
		}
	}
	if got := unitOf(filepath.Join(t.TempDir(), "missing")); got != "" {
		t.Errorf("without a file: got %q", got)
	}
}

func TestHasSetting(t *testing.T) {
	for _, test := range []struct {
		name, unit string
		files      map[string]string
		want       bool
		err        error
	}{
		{"no file", "web.service", map[string]string{"other.service": "PIDFile=/run/pid\n"}, false, fs.ErrNotExist},
		{"unit", "web.service", map[string]string{"web.service": "[Service]\nPIDFile=/run/pid\n"}, true, nil},
		{"spaces", "web.service", map[string]string{"web.service": "[Service]\n  PIDFile = /run/pid\n"}, true, nil},
		{"not set", "web.service", map[string]string{"web.service": "[Service]\n# PIDFile=/run/pid\nPIDFileOther=x\n"}, false, nil},
		{"empty", "web.service", map[string]string{"web.service": "[Service]\nPIDFile=\n"}, false, nil},
		{"drop-in", "web.service", map[string]string{"web.service": "[Service]\n", "web.service.d/a.conf": "[Service]\nPIDFile=/run/pid\n"}, true, nil},
		{"drop-in alone", "web.service", map[string]string{"web.service.d/a.conf": "[Service]\n"}, false, nil},
		{"template", "web@1.service", map[string]string{"web@.service": "[Service]\nPIDFile=/run/pid\n"}, true, nil},
		{"template's drop-in", "web@1.service", map[string]string{"web@.service": "", "web@.service.d/a.conf": "PIDFile=/run/pid"}, true, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			first, second := t.TempDir(), t.TempDir()
			for path, content := range test.files {
				write(t, filepath.Join(second, path), content)
			}
			got, err := hasSetting([]string{first, filepath.Join(first, "missing"), second}, test.unit, "PIDFile")
			if got != test.want || !errors.Is(err, test.err) {
				t.Errorf("got %v, %v, want %v, %v", got, err, test.want, test.err)
			}
		})
	}
}

func TestHasSettingUnreadable(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "web.service"), 0o755); err != nil {
		t.Fatal(err)
	}
	if has, err := hasSetting([]string{dir}, "web.service", "PIDFile"); has || err == nil {
		t.Errorf("a unit that can't be read: got %v, %v", has, err)
	}
}

func TestUnitPath(t *testing.T) {
	t.Setenv("HOME", "/home/web")
	t.Setenv("XDG_CONFIG_HOME", "/config")
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/1000")
	own := []string{"/config/systemd/user", "/run/user/1000/systemd/user", "/run/user/1000/systemd/transient", "/usr/lib/systemd/user"}
	for uid, want := range map[int]bool{0: false, 1000: true} {
		path := unitPath(uid)
		for _, dir := range own {
			if slices.Contains(path, dir) != want {
				t.Errorf("user %d: %s is among %q: %t", uid, dir, path, !want)
			}
		}
		if !slices.Contains(path, "/etc/systemd/system") {
			t.Errorf("user %d: the system's units are not among %q", uid, path)
		}
	}

	t.Setenv("HOME", "")
	t.Setenv("XDG_CONFIG_HOME", "")
	t.Setenv("XDG_RUNTIME_DIR", "")
	for _, dir := range unitPath(1000) {
		if !filepath.IsAbs(dir) {
			t.Errorf("without a home: %q", dir)
		}
	}
}

func TestWatchesFirst(t *testing.T) {
	own := strconv.Itoa(os.Getpid())
	for _, test := range []struct {
		name         string
		env          Env
		cgroup, unit string
		want         bool
	}{
		{"simple", Env{"SYSTEMD_EXEC_PID": own}, "0::/web.service", "[Service]", true},
		{"notify", Env{"SYSTEMD_EXEC_PID": own, "NOTIFY_SOCKET": "/run/notify"}, "0::/web.service", "[Service]", false},
		{"PIDFile", Env{"SYSTEMD_EXEC_PID": own}, "0::/web.service", "PIDFile=/run/pid", false},
		{"another process was started", Env{"SYSTEMD_EXEC_PID": "1"}, "0::/web.service", "[Service]", false},
		{"an older systemd", Env{}, "0::/web.service", "[Service]", false},
		{"no unit", Env{"SYSTEMD_EXEC_PID": own}, "0::/session-1.scope", "[Service]", false},
		{"another unit", Env{"SYSTEMD_EXEC_PID": own}, "0::/other.service", "[Service]", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			cgroup := filepath.Join(dir, "cgroup")
			write(t, cgroup, test.cgroup)
			write(t, filepath.Join(dir, "web.service"), test.unit)
			if got := test.env.watchesFirst(cgroup, []string{dir}); got != test.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
