package systemd

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
)

// An Env holds the variables by which the manager talks to the processes of a
// service (systemd.exec(5)). Programs drop them: os.Clearenv does, and so do libraries
// that speak sd_notify(3) and are asked to. Every generation needs them.
type Env map[string]string

// supervisor is where package supervise, which speaks for systemd, leaves its PID.
const supervisor = "TABLEFLIP_SUPERVISOR"

var envNames = []string{"NOTIFY_SOCKET", "INVOCATION_ID", "MANAGERPID", "WATCHDOG_USEC", "SYSTEMD_EXEC_PID", supervisor}

// atStart is what there was before the program could drop it.
var atStart = readEnv(nil)

func readEnv(missing Env) Env {
	env := make(Env)
	for _, name := range envNames {
		if value := os.Getenv(name); value != "" {
			env[name] = value
		} else if missing[name] != "" {
			env[name] = missing[name]
		}
	}
	return env
}

// FindEnv returns the variables as they are, or were when the process started.
func FindEnv() Env { return readEnv(atStart) }

// ForChild returns a child's environment with the variables that it lacks. It removes
// a WATCHDOG_PID that names this process, which would tell the child that the watchdog
// (sd_watchdog_enabled(3)) is not for it.
func (e Env) ForChild(environ []string) []string {
	own := "WATCHDOG_PID=" + strconv.Itoa(os.Getpid())
	environ = slices.DeleteFunc(environ, func(variable string) bool { return variable == own })
	for _, name := range envNames {
		has := func(variable string) bool { return strings.HasPrefix(variable, name+"=") }
		if value, ok := e[name]; ok && !slices.ContainsFunc(environ, has) {
			environ = append(environ, name+"="+value)
		}
	}
	return environ
}

// IsParent reports whether systemd is the parent of this process. New processes are
// then started as its children, too. It says of a main process that is none
// ("Supervising process which is not our child") that it does not wait for it: it
// sends it SIGKILL right after SIGTERM when the unit is stopped, and does not notice
// if it dies.
func (e Env) IsParent() bool {
	if e["INVOCATION_ID"] == "" {
		return false
	}
	parent := os.Getppid()
	return parent == 1 || strconv.Itoa(parent) == e["MANAGERPID"]
}

// Supervisor returns the PID of the supervisor that this process or one that has
// started it may have, or 0.
func (e Env) Supervisor() int {
	pid, _ := strconv.Atoi(e[supervisor])
	return pid
}

// Notifier returns nil if nobody wants to be notified.
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
