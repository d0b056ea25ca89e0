package systemd

import (
	"cmp"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
)

// An Env holds the variables by which the manager talks to the processes of a service
// (systemd.exec(5)). Every generation needs them, and programs remove them: os.Clearenv
// does, and libraries for sd_notify(3) do on request.
type Env map[string]string

// supervisor names the variable in which package supervise leaves its PID.
const supervisor = "TABLEFLIP_SUPERVISOR"

var envNames = []string{"NOTIFY_SOCKET", "INVOCATION_ID", "MANAGERPID", "WATCHDOG_USEC", "SYSTEMD_EXEC_PID", supervisor}

// atStart holds the variables from before the program could remove them.
var atStart = readEnv(nil)

func readEnv(missing Env) Env {
	env := make(Env)
	for _, name := range envNames {
		env[name] = cmp.Or(os.Getenv(name), missing[name])
	}
	return env
}

// FindEnv returns the variables as they are or, if they were removed, as they were when
// the process started.
func FindEnv() Env { return readEnv(atStart) }

// ForChild returns a child's environment with the variables that it lacks. It removes a
// WATCHDOG_PID that names this process, because that would tell the child that the
// watchdog is not meant for it (sd_watchdog_enabled(3)).
func (e Env) ForChild(environ []string) []string {
	own := "WATCHDOG_PID=" + strconv.Itoa(os.Getpid())
	environ = slices.DeleteFunc(environ, func(variable string) bool { return variable == own })
	for _, name := range envNames {
		has := func(variable string) bool { return strings.HasPrefix(variable, name+"=") }
		if value := e[name]; value != "" && !slices.ContainsFunc(environ, has) {
			environ = append(environ, name+"="+value)
		}
	}
	return environ
}

// IsParent reports whether systemd is the parent of this process. New processes are then
// started as systemd's children, too. For a main process that is not its child
// ("Supervising process which is not our child"), systemd does not wait: it sends SIGKILL
// right after SIGTERM when the unit is stopped, and does not notice if the process dies.
func (e Env) IsParent() bool {
	if e["INVOCATION_ID"] == "" {
		return false
	}
	parent := os.Getppid()
	return parent == 1 || strconv.Itoa(parent) == e["MANAGERPID"]
}

// Supervisor returns the PID of the supervisor that may have started this process or one
// of its ancestors, or 0 if there is none.
func (e Env) Supervisor() int {
	pid, _ := strconv.Atoi(e[supervisor])
	return pid
}

// Notifier returns a Notifier, or nil if there is no NOTIFY_SOCKET.
func (e Env) Notifier(logger *slog.Logger) *Notifier {
	path := e["NOTIFY_SOCKET"]
	if path == "" {
		return nil
	}
	n := &Notifier{&net.UnixAddr{Net: "unixgram", Name: path}, logger}
	if path[0] != '/' && path[0] != '@' {
		n.log(fmt.Errorf("NOTIFY_SOCKET is %q, which is no Unix socket", path))
		return nil
	}
	return n
}
