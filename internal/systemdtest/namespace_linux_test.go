package systemdtest

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"example.com/tableflip/examples/deploy/systemd"
	"example.com/tableflip/internal/machine"
	"example.com/tableflip/internal/proctest"
	_ "example.com/tableflip/service" // so that go test knows that the result depends on it
)

// This file owns the machines that the tests run on. Each test runs this binary again, for
// itself alone, on a machine of its own (see package machine).
//
// SYSTEMDTEST_ROOT may name a directory with another Debian, such as debootstrap makes.
// The machines then have its systemd.

// binariesVariable holds, in the inner test binary, the directory of the service's
// binary.
const binariesVariable = "SYSTEMDTEST_BINARIES"

const rootVariable = "SYSTEMDTEST_ROOT"

const units = machine.Units

var binaries = os.Getenv(binariesVariable)

// managerPID is that of systemd on this machine.
var managerPID int

// whyNot is why the tests can't run here, or empty.
var whyNot string

func TestMain(m *testing.M) {
	root := os.Getenv(rootVariable)
	if binaries != "" {
		// See Boot.
		runtime.LockOSThread()
		var err error
		own := machine.Machine{Root: root, Directory: filepath.Dir(installed), Shared: binaries, UnitFiles: systemd.Units}
		if binaries, managerPID, err = own.Boot(); err != nil {
			fmt.Fprintln(os.Stderr, "start systemd:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	// They wait more than they work. The flag, if it is given, counts.
	flag.Set("test.parallel", "5")
	status := 1
	if whyNot = machine.Missing(root); whyNot != "" {
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
	only := "^" + strings.ReplaceAll(t.Name(), "/", "$/^") + "$"
	inner := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run="+only, "-test.v=true")
	inner.Env = append(os.Environ(), binariesVariable+"="+binaries)
	inner.Stdout, inner.Stderr = t.Output(), t.Output()
	if err := machine.Run(inner); err != nil {
		t.Error("on a machine of its own:", err)
	}
}
