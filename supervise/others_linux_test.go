package supervise_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip/internal/proctest"
)

// These tests run the supervisor under other supervisors, with the recipes of
// examples/deploy.

const manyUpgrades = 10

func TestUnderRunit(t *testing.T) {
	t.Parallel()
	runsv, err := exec.LookPath("runsv")
	if err != nil {
		t.Skip("needs runsv, of Debian's package runit")
	}
	b := newBed(t)
	dir := filepath.Join(b.dir, "service")
	proctest.OK(t, os.Mkdir(dir, 0o755))
	proctest.OK(t, os.Symlink(recipe(t, "runit/run"), filepath.Join(dir, "run")))
	sv := func(command string) string {
		t.Helper()
		output, err := exec.Command("sv", command, dir).CombinedOutput()
		if err != nil {
			t.Fatalf("sv %s: %v: %s", command, err, output)
		}
		return string(output)
	}
	b.startRecipe(runsv, dir)
	b.upgradeUnderLoad(manyUpgrades, func() { sv("hup") })
	if starts := b.log.Count("msg=started"); starts != 1 {
		t.Errorf("started %d times", starts)
	}
	sv("exit")
	b.wantStatus(0)
	b.log.Await("msg=ended", "status=0")
}

func TestUnderSupervisord(t *testing.T) {
	t.Parallel()
	supervisord, err := exec.LookPath("supervisord")
	if err != nil {
		t.Skip("needs supervisord, of Debian's package supervisor")
	}
	b := newBed(t)
	configuration, socket := filepath.Join(b.dir, "supervisord.conf"), filepath.Join(b.dir, "supervisord.sock")
	if err := os.WriteFile(configuration, []byte(strings.Join([]string{
		"[supervisord]",
		"nodaemon=true",
		"logfile=/dev/null",
		"logfile_maxbytes=0",
		"pidfile=" + filepath.Join(b.dir, "supervisord.pid"),
		"childlogdir=" + b.dir,
		"[unix_http_server]",
		"file=" + socket,
		"[rpcinterface:supervisor]",
		"supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
		"[include]",
		"files=" + recipe(t, "supervisord.conf"),
	}, "\n")), 0o644); err != nil {
		t.Fatal(err)
	}
	b.startRecipe(supervisord, "-c", configuration)
	b.upgradeUnderLoad(manyUpgrades, func() {
		output, err := exec.Command("supervisorctl", "-s", "unix://"+socket, "signal", "HUP", "web").CombinedOutput()
		if err != nil {
			t.Fatalf("supervisorctl: %v: %s", err, output)
		}
	})
	if starts := b.log.Count("spawned: 'web'"); starts != 1 {
		t.Errorf("started %d times", starts)
	}
	b.signal(syscall.SIGTERM)
	b.log.Await("stopped: web (exit status 0)")
	b.wantStatus(0)
}

func TestInForeground(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.startRecipe(recipe(t, "foreground.sh"))
	b.upgradeUnderLoad(manyUpgrades, func() { b.signal(syscall.SIGHUP) })
	b.signal(syscall.SIGTERM)
	b.wantStatus(0)
}

// recipe returns the path of one that is there.
func recipe(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("../examples/deploy", name))
	proctest.OK(t, err)
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	return path
}

// startRecipe starts a program that finds this binary in PATH as tableflip-supervise,
// and as web, a real server.
func (b *bed) startRecipe(name string, arguments ...string) {
	b.t.Helper()
	bin, err := filepath.Abs("testdata/bin")
	proctest.OK(b.t, err)
	cmd := exec.Command(name, arguments...)
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"),
		"SUPERVISE_TEST_SUPERVISE="+strings.Join(proctest.Arguments("supervise"), " "),
		"SUPERVISE_TEST_WEB="+strings.Join(proctest.Arguments("serve"), " "))
	b.start(cmd)
}
