//go:build unix

// Package proctest is the harness of all tests that start processes. Its subject is a
// service: a chain of processes, one generation after the other.
//
// The processes are the test's own binary, started again. What such a process does is
// a role, a function with a name, registered by Role in an init function. It reports
// what has happened by Report, for which the test waits by [Service.Await]. A process
// that has opened a Wire also tells its steps (see package step), can be paused there,
// and takes orders.
//
// A TestMain must call Main. It fails if two roles have one name or, once all tests
// were run, if a role was not played.
//
// All tests speak the same words:
//
//   - Must panics, which ends a role's process with status 2. It is for roles, and for the
//     preparations of a test.
//   - OK ends the test. It is for errors after which the test cannot go on.
//   - Want… checks something: the test fails, and goes on where it can.
//   - Await… and Within wait for an event. After Patience they end the test.
//   - Report sends a message from a process to the test, Order one from the test to a
//     process.
package proctest

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/step"

	"golang.org/x/sys/unix"
)

// Patience bounds every wait for an event. No test passes because of it.
const Patience = time.Minute

const (
	roleArgument   = "proctest.role="  // begins a first argument
	roleVariable   = "PROCTEST_ROLE"   // counts if there is no such argument
	argVariable    = "PROCTEST_ARG"    // see Arg
	playedVariable = "PROCTEST_PLAYED" // a directory with an entry for each role that was played
	wireVariable   = "PROCTEST_WIRE"   // where the test listens
	dieVariable    = "PROCTEST_DIE"    // a step, of this process only
	pauseVariable  = "PROCTEST_PAUSE"  // a step, of this process only
)

var roles = map[string]func(){}

// Role registers what a process does in the role of this name. It is for init
// functions. The process ends with status 0 when play returns.
func Role(name string, play func()) {
	if roles[name] != nil || name == "" {
		panic(fmt.Sprintf("two roles have the name %q, or none", name))
	}
	roles[name] = play
}

// Main plays the role of this process, or runs the tests. It does not return.
func Main(m *testing.M) {
	step.ExitGrace, step.KillTimeout = Patience, Patience
	if name := roleOfThisProcess(); name != "" {
		play(name)
	}

	// Descriptors that the caller has left open would show in those of some processes.
	for fd := 3; fd < 1024; fd++ {
		unix.CloseOnExec(fd)
	}
	// The race detector would have every process sleep for a second at its end. Nobody
	// checks the exit status of most processes that are started from here, so they end at
	// the first race, and their tests fail because they are missing.
	os.Setenv("GORACE", "atexit_sleep_ms=0 halt_on_error=1 "+os.Getenv("GORACE"))
	played, err := os.MkdirTemp("", "proctest")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Setenv(playedVariable, played)
	status := m.Run()
	if unplayed := unplayedRoles(played); status == 0 && ranAllTests() && len(unplayed) > 0 {
		fmt.Fprintf(os.Stderr, "no test uses the roles %q\n", unplayed)
		status = 1
	}
	os.RemoveAll(played)
	os.Exit(status)
}

func roleOfThisProcess() string {
	if len(os.Args) > 1 {
		if name, found := strings.CutPrefix(os.Args[1], roleArgument); found {
			return name
		}
	}
	return os.Getenv(roleVariable)
}

func play(name string) {
	run, ok := roles[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "no role %q\n", name)
		os.Exit(3)
	}
	markUsed(name)
	hookSteps()
	run()
	os.Exit(0)
}

// markUsed makes a directory because that needs no descriptor, which some roles count.
func markUsed(role string) {
	if played := os.Getenv(playedVariable); played != "" {
		_ = os.Mkdir(filepath.Join(played, role), 0o700)
	}
}

func unplayedRoles(played string) []string {
	var unplayed []string
	for name := range roles {
		if !Exists(filepath.Join(played, name)) {
			unplayed = append(unplayed, name)
		}
	}
	slices.Sort(unplayed)
	return unplayed
}

func ranAllTests() bool {
	for _, name := range []string{"test.run", "test.skip", "test.list", "test.fuzz"} {
		if f := flag.Lookup(name); f != nil && f.Value.String() != "" {
			return false
		}
	}
	worker := flag.Lookup("test.fuzzworker")
	return !testing.Short() && (worker == nil || worker.Value.String() != "true")
}

// hookSteps has this process die where its test wants, and tell its steps.
func hookSteps() {
	die := stepIn(dieVariable)
	step.SetHook(func(s step.Step) {
		if s == die {
			Report(died, s)
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		if w := wire.Load(); w != nil {
			w.reached(s)
		}
	})
}

// stepIn returns the step in a variable, which is removed, or none.
func stepIn(variable string) step.Step {
	name := Take(variable)
	if name == "" {
		return step.Step{}
	}
	return Must(step.Parse(name))
}

// Environment returns the variable by which a process gets a role, for an
// exec.Cmd that a role makes.
func Environment(role string) string {
	if roles[role] == nil {
		panic(fmt.Sprintf("no role %q", role))
	}
	markUsed(role)
	return roleVariable + "=" + role
}

// Arguments returns the command line by which a process gets a role, whatever its
// environment is. The role finds arguments in os.Args[2:].
func Arguments(role string, arguments ...string) []string {
	Environment(role)
	return append([]string{os.Args[0], roleArgument + role}, arguments...)
}

// Run plays a role in a process of its own, whose arguments are the role's alone, and waits
// for its end.
func Run(t testing.TB, role string, arguments ...string) (status int, stdout, stderr string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], arguments...)
	cmd.Env = append(os.Environ(), Environment(role))
	var output, log strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &log
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), output.String(), log.String()
}

// Arg returns the argument of this role, such as a path, names, or a variant.
func Arg() string { return os.Getenv(argVariable) }

// WithArg returns the variable that makes value the Arg of a process, and of those
// that inherit its environment.
func WithArg(value string) string { return argVariable + "=" + value }

// SetArg sets the Arg of the processes that a role starts.
func SetArg(value string) { os.Setenv(argVariable, value) }

// Take returns a variable of the environment and removes it, so that this process's
// children do not inherit it.
func Take(variable string) string {
	value := os.Getenv(variable)
	os.Unsetenv(variable)
	return value
}

// Must returns value, and panics if err is not nil.
func Must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// Report tells the test of an event in this process. An event is one word.
func Report(event string, details ...any) {
	if strings.ContainsAny(event, " \n") {
		panic("an event is one word: " + event)
	}
	fmt.Fprintf(os.Stdout, "report %d %s %s\n", os.Getpid(), event, strconv.Quote(textOf(details)))
}

func textOf(details []any) string { return strings.TrimSuffix(fmt.Sprintln(details...), "\n") }

// Terminated is for roles that SIGTERM ends. Call it before the test can know of the
// process.
func Terminated() <-chan os.Signal {
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM)
	return terminate
}

// UntilKilled keeps a role's process alive, until SIGTERM at the latest.
func UntilKilled() { <-Terminated() }

// CauseOf names what errors.Is and errors.As find in err.
func CauseOf(err error) string {
	var exit *exec.ExitError
	var errno syscall.Errno
	switch {
	case errors.As(err, &exit):
		return exit.ProcessState.String()
	case errors.As(err, &errno):
		return errno.Error()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "deadline"
	}
	return ""
}
