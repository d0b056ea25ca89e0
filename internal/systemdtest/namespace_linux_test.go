package systemdtest

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/examples/deploy/systemd"
	"example.com/tableflip/internal/proctest"
	_ "example.com/tableflip/service" // so that go test knows that the result depends on it
)

// This file owns the machines that the tests run on. Each test runs this binary
// again, for itself alone, as the init process of new namespaces, with /run,
// /usr/local/bin, the network and the cgroups to itself. There it starts journald
// and systemd's user manager, which treats services as the system manager does, so
// that the unit files need no change. The kernel ends all processes of the machine with
// its init process, and the init process with the outer test.
//
// SYSTEMDTEST_ROOT may name a directory with another Debian, such as debootstrap makes.
// The machines then have its systemd.

// binariesVariable holds, in the inner test binary, the directory of the service's
// binary.
const binariesVariable = "SYSTEMDTEST_BINARIES"

const rootVariable = "SYSTEMDTEST_ROOT"

const systemdBinary = "/usr/lib/systemd/systemd"

// units is where a machine has its unit files. The package looks for them there, too.
const units = "/run/systemd/system"

var binaries = os.Getenv(binariesVariable)

// managerPID is that of systemd on this machine.
var managerPID int

// whyNot is why the tests can't run here, or empty.
var whyNot string

func TestMain(m *testing.M) {
	if binaries != "" {
		// The cgroup namespace is this thread's, and that of the processes that
		// it starts.
		runtime.LockOSThread()
		if err := boot(); err != nil {
			fmt.Fprintln(os.Stderr, "start systemd:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	// They wait more than they work. The flag, if it is given, counts.
	flag.Set("test.parallel", "5")
	status := 1
	if whyNot = missing(); whyNot != "" {
		status = m.Run()
	} else if err := build(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		status = m.Run()
	}
	os.RemoveAll(binaries)
	os.Exit(status)
}

func build() (err error) {
	binaries, err = os.MkdirTemp("", "systemdtest")
	if err != nil {
		return err
	}
	for _, args := range [][]string{
		{"-o", binaries, "./web", "example.com/tableflip/cmd/tableflip-supervise"},
		{"-o", filepath.Join(binaries, ours), "./either"},
		{"-o", filepath.Join(binaries, theirs), "-tags", "cloudflare", "./either"},
	} {
		command := exec.Command("go", append([]string{"build", "-ldflags", "-X main.version=" + placeholder}, args...)...)
		if output, err := command.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", command, err, output)
		}
	}
	return nil
}

// missing says what the machine lacks.
func missing() string {
	if _, err := os.Stat(filepath.Join(os.Getenv(rootVariable), systemdBinary)); err != nil {
		return "no systemd here: " + err.Error()
	}
	if os.Geteuid() != 0 {
		return "only root may make the namespaces in which systemd runs"
	}
	if _, err := ownCgroup(); err != nil {
		return err.Error()
	}
	probe := exec.Command("/bin/true")
	probe.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces | unix.CLONE_NEWCGROUP}
	if err := probe.Run(); err != nil {
		return "can't make namespaces here: " + err.Error()
	}
	return ""
}

const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// ownCgroup returns the directory of this process's cgroup.
func ownCgroup() (string, error) {
	membership, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(membership)) {
		path, unified := strings.CutPrefix(strings.TrimSpace(line), "0::")
		for mount := range strings.Lines(string(mounts)) {
			if fields := strings.Fields(mount); unified && fields[2] == "cgroup2" {
				return filepath.Join(fields[1], path), nil
			}
		}
	}
	return "", errors.New("no cgroup2 hierarchy is mounted here")
}

// onMachine runs test on a machine of its own, beside the others.
func onMachine(t *testing.T, test func(*testing.T)) {
	if os.Getenv(binariesVariable) != "" {
		test(t)
		return
	}
	if whyNot != "" {
		t.Skip(whyNot)
	}
	t.Parallel()
	// The result depends on both, which go test learns from this.
	os.Getenv(rootVariable)
	for _, program := range []string{"web", "either"} {
		_, err := os.ReadDir(program)
		proctest.OK(t, err)
	}
	parent, err := ownCgroup()
	proctest.OK(t, err)
	cgroup, err := os.MkdirTemp(parent, "systemdtest")
	proctest.OK(t, err)
	t.Cleanup(func() { removeCgroup(t, cgroup) })
	directory, err := os.Open(cgroup)
	proctest.OK(t, err)
	defer directory.Close()

	// The parent whose death ends the machine is this thread, see prctl(2).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	inner := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v=true")
	inner.Env = append(os.Environ(), binariesVariable+"="+binaries)
	inner.Stdout, inner.Stderr = t.Output(), t.Output()
	inner.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  namespaces,
		Pdeathsig:   syscall.SIGKILL,
		UseCgroupFD: true,
		CgroupFD:    int(directory.Fd()),
	}
	if err := inner.Run(); err != nil {
		t.Error("on a machine of its own:", err)
	}
}

// removeCgroup removes a cgroup without processes and those in it.
func removeCgroup(t *testing.T, path string) {
	children, err := os.ReadDir(path)
	if err != nil {
		t.Error(err)
	}
	for _, child := range children {
		if child.IsDir() {
			removeCgroup(t, filepath.Join(path, child.Name()))
		}
	}
	if err := os.Remove(path); err != nil {
		t.Error(err)
	}
}

// boot makes this process, the first of its namespaces, the init process of a
// machine that runs systemd.
func boot() error {
	if os.Getpid() != 1 {
		return fmt.Errorf("%s is set, but this is not the init process", binariesVariable)
	}
	if err := mountAll(); err != nil {
		return err
	}
	if err := raiseLoopback(); err != nil {
		return err
	}
	for _, dir := range []string{"/run/systemd/journal", "/run/user"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := os.Mkdir("/run/user/0", 0o700); err != nil {
		return err
	}
	if err := os.CopyFS(units, systemd.Units); err != nil {
		return err
	}
	os.Unsetenv("DBUS_SESSION_BUS_ADDRESS")
	os.Setenv("XDG_RUNTIME_DIR", "/run/user/0")
	os.Setenv("SYSTEMD_UNIT_PATH", units+":/usr/lib/systemd/user")
	os.Setenv("SYSTEMD_LOG_TARGET", "journal")
	if _, err := startNotifying("/usr/lib/systemd/systemd-journald"); err != nil {
		return err
	}
	var err error
	managerPID, err = startNotifying(systemdBinary, "--user", "--unit=basic.target")
	return err
}

func mountAll() error {
	// The mounts of this namespace are to be seen nowhere else.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make a cgroup namespace: %w", err)
	}
	root := os.Getenv(rootVariable)
	if root != "" {
		for _, dir := range []string{"/dev", "/sys"} {
			if err := unix.Mount(dir, filepath.Join(root, dir), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
				return fmt.Errorf("mount %s in %s: %w", dir, root, err)
			}
		}
	}
	for _, mount := range []struct{ target, kind, options string }{
		{"/proc", "proc", ""},
		{"/run", "tmpfs", "mode=755"},
		{filepath.Dir(installed), "tmpfs", "mode=755"},
		{"/sys/fs/cgroup", "cgroup2", ""},
	} {
		if err := unix.Mount(mount.kind, filepath.Join(root, mount.target), mount.kind, 0, mount.options); err != nil {
			return fmt.Errorf("mount %s: %w", mount.target, err)
		}
	}
	if root == "" {
		return nil
	}
	return enter(root)
}

// enter makes root the root directory of this machine.
func enter(root string) error {
	inside := "/run/binaries"
	target := filepath.Join(root, inside)
	if err := os.Mkdir(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(binaries, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	binaries = inside
	if err := unix.Chroot(root); err != nil {
		return fmt.Errorf("enter %s: %w", root, err)
	}
	return os.Chdir("/")
}

func raiseLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request); err != nil {
		return fmt.Errorf("raise the loopback interface: %w", err)
	}
	return nil
}

// startNotifying starts a program that tells its manager, us, when it is up.
func startNotifying(path string, args ...string) (pid int, err error) {
	socket := &net.UnixAddr{Net: "unixgram", Name: filepath.Join("/run", filepath.Base(path)+".notify")}
	manager, err := net.ListenUnixgram("unixgram", socket)
	if err != nil {
		return 0, err
	}
	defer manager.Close()
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+socket.Name)
	output, err := os.Create(filepath.Join("/run", filepath.Base(path)+".log"))
	if err != nil {
		return 0, err
	}
	defer output.Close()
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	go func() {
		cmd.Wait()
		manager.SetReadDeadline(time.Unix(1, 0))
	}()
	manager.SetReadDeadline(time.Now().Add(proctest.Patience))
	message := make([]byte, 4096)
	for {
		n, err := manager.Read(message)
		if err != nil {
			log, _ := os.ReadFile(output.Name())
			return 0, fmt.Errorf("%s did not come up: %w\n%s", path, err, log)
		}
		if bytes.Contains(message[:n], []byte("READY=1")) {
			return cmd.Process.Pid, nil
		}
	}
}
