// Package machine gives a program a machine of its own, with systemd: new namespaces, in
// which /run, one more directory, the network and the cgroups are its own. The program
// starts itself again by [Run], as the init process there, which calls [Machine.Boot]. That
// starts journald and systemd's user manager, which treats services as the system manager
// does, so that unit files need no change.
//
// It is for tests and benchmarks. Only root can make the namespaces.
package machine

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Units is where a machine has its unit files. The package looks for them there, too.
const Units = "/run/systemd/system"

const systemdBinary = "/usr/lib/systemd/systemd"

// patience bounds the wait for journald and systemd to come up.
const patience = 30 * time.Second

// A Machine is what the program finds on its machine.
type Machine struct {
	// Root, if not empty, is a directory with another Debian, such as debootstrap makes. The
	// machine then has its systemd.
	Root string

	// Directory is empty on the machine, and its own.
	Directory string

	// Shared is a directory that the machine sees. Boot returns where.
	Shared string

	// UnitFiles are copied to Units.
	UnitFiles fs.FS
}

// Missing says what is lacking here for a machine with the systemd of root, see
// [Machine.Root], or returns "".
func Missing(root string) string {
	if _, err := os.Stat(filepath.Join(root, systemdBinary)); err != nil {
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

// Run runs cmd as the init process of a machine, and returns when it has ended. The kernel
// ends all processes of the machine with it, and ends it with this process.
func Run(cmd *exec.Cmd) (err error) {
	parent, err := ownCgroup()
	if err != nil {
		return err
	}
	cgroup, err := os.MkdirTemp(parent, "machine")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeCgroup(cgroup)) }()
	directory, err := os.Open(cgroup)
	if err != nil {
		return err
	}
	defer directory.Close()

	// The parent whose death ends the machine is this thread, see prctl(2).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  namespaces,
		Pdeathsig:   syscall.SIGKILL,
		UseCgroupFD: true,
		CgroupFD:    int(directory.Fd()),
	}
	return cmd.Run()
}

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

// removeCgroup removes a cgroup without processes and those in it.
func removeCgroup(path string) error {
	children, err := os.ReadDir(path)
	for _, child := range children {
		if child.IsDir() {
			err = errors.Join(err, removeCgroup(filepath.Join(path, child.Name())))
		}
	}
	return errors.Join(err, os.Remove(path))
}

// Boot makes this process, the first of its namespaces, the init process of the machine.
// It returns where Shared is, and systemd's PID. The cgroup namespace is this thread's, and
// that of the processes that it starts, so that the caller must have locked it.
func (m Machine) Boot() (shared string, manager int, err error) {
	if os.Getpid() != 1 {
		return "", 0, errors.New("this is not the init process of a machine")
	}
	if shared, err = m.mountAll(); err != nil {
		return "", 0, err
	}
	if err := raiseLoopback(); err != nil {
		return "", 0, err
	}
	for _, dir := range []string{"/run/systemd/journal", "/run/user"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", 0, err
		}
	}
	if err := os.Mkdir("/run/user/0", 0o700); err != nil {
		return "", 0, err
	}
	if err := os.CopyFS(Units, m.UnitFiles); err != nil {
		return "", 0, err
	}
	os.Unsetenv("DBUS_SESSION_BUS_ADDRESS")
	os.Setenv("XDG_RUNTIME_DIR", "/run/user/0")
	os.Setenv("SYSTEMD_UNIT_PATH", Units+":/usr/lib/systemd/user")
	os.Setenv("SYSTEMD_LOG_TARGET", "journal")
	if _, err := startNotifying("/usr/lib/systemd/systemd-journald"); err != nil {
		return "", 0, err
	}
	manager, err = startNotifying(systemdBinary, "--user", "--unit=basic.target")
	return shared, manager, err
}

func (m Machine) mountAll() (shared string, err error) {
	// The mounts of this namespace are to be seen nowhere else.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "", fmt.Errorf("make the mounts private: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return "", fmt.Errorf("make a cgroup namespace: %w", err)
	}
	if m.Root != "" {
		for _, dir := range []string{"/dev", "/sys"} {
			if err := unix.Mount(dir, filepath.Join(m.Root, dir), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
				return "", fmt.Errorf("mount %s in %s: %w", dir, m.Root, err)
			}
		}
	}
	for _, mount := range []struct{ target, kind, options string }{
		{"/proc", "proc", ""},
		{"/run", "tmpfs", "mode=755"},
		{m.Directory, "tmpfs", "mode=755"},
		{"/sys/fs/cgroup", "cgroup2", ""},
	} {
		if err := unix.Mount(mount.kind, filepath.Join(m.Root, mount.target), mount.kind, 0, mount.options); err != nil {
			return "", fmt.Errorf("mount %s: %w", mount.target, err)
		}
	}
	if m.Root == "" {
		return m.Shared, nil
	}
	return m.enter()
}

// enter makes Root the root directory of this machine, and returns where Shared is then.
func (m Machine) enter() (string, error) {
	const inside = "/run/shared"
	target := filepath.Join(m.Root, inside)
	if err := os.Mkdir(target, 0o755); err != nil {
		return "", err
	}
	if err := unix.Mount(m.Shared, target, "", unix.MS_BIND, ""); err != nil {
		return "", fmt.Errorf("mount %s: %w", target, err)
	}
	if err := unix.Chroot(m.Root); err != nil {
		return "", fmt.Errorf("enter %s: %w", m.Root, err)
	}
	return inside, os.Chdir("/")
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
	manager.SetReadDeadline(time.Now().Add(patience))
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
