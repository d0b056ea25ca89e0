//go:build unix

// Package handovertest holds the tests of the root package that need real processes:
// chains of generations, deaths at each step of a handover, starts that fail, a mock
// service manager, and races. Here is what they share with the root's own tests; the
// words are those of package proctest.
package handovertest

import (
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/inherit"
	"example.com/tableflip/internal/proctest"
)

// NewUpgrader is for tests that need no child.
func NewUpgrader(t *testing.T, opts tableflip.Options) *tableflip.Upgrader {
	t.Helper()
	upg, err := tableflip.New(opts)
	proctest.OK(t, err)
	t.Cleanup(func() {
		upg.Stop()
		// Until then, a goroutine looks at what other tests change.
		proctest.AwaitThat(t, "a process whose trial was undone has ended", func() bool {
			all := upg.Generations()
			newest := all[len(all)-1]
			return newest.PID == os.Getpid() || newest.State != "draining"
		})
	})
	return upg
}

// NewParent makes the test itself the first generation. Its children get the role
// and env, which may be changed between upgrades.
func NewParent(t *testing.T, opts tableflip.Options, role string, env ...string) (*tableflip.Upgrader, *proctest.Service) {
	t.Helper()
	proctest.Environment(role) // there must be one
	s := proctest.NewService(t)
	customize := opts.Command
	opts.Command = func(cmd *exec.Cmd) {
		s.Prepare(cmd, role, env...)
		if customize != nil {
			customize(cmd)
		}
	}
	return NewUpgrader(t, opts), s
}

// Upgrade is for tests whose Ready and Upgrade succeed.
func Upgrade(t *testing.T, upg *tableflip.Upgrader) {
	t.Helper()
	proctest.OK(t, upg.Ready())
	proctest.OK(t, upg.Upgrade())
}

// MustBeReady is for roles.
func MustBeReady(upg *tableflip.Upgrader) { proctest.Must(0, upg.Ready()) }

// Variables returns what the environment holds of a handover.
func Variables() []string {
	return slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return !strings.HasPrefix(variable, inherit.Variable)
	})
}

func init() {
	// answer serves its own PID on the listener that it inherits, once.
	proctest.Role("answer", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		ln := proctest.Must(upg.Listener("tcp", "localhost:0"))
		MustBeReady(upg)
		proctest.Report("ready", upg.HasParent())
		conn := proctest.Must(ln.Accept())
		proctest.Must(io.WriteString(conn, strconv.Itoa(os.Getpid())))
		conn.Close()
	})
	// succeed becomes ready and exits.
	proctest.Role("succeed", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		proctest.Report("ready")
	})
	proctest.Role("fail", func() { os.Exit(7) })
	// hang never becomes ready.
	proctest.Role("hang", func() {
		proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Report("hanging")
		proctest.UntilKilled()
	})
}

// AnswerAll is a role. It takes the listeners whose networks and addresses it is told,
// and answers on each of them with its index. It takes packet conns too, from
// which it reports what it receives.
func AnswerAll() {
	upg := proctest.Must(tableflip.New(tableflip.Options{}))
	var serve []func()
	for i, line := range strings.Split(proctest.Arg(), "\n") {
		network, addr, _ := strings.Cut(line, " ")
		if strings.HasPrefix(network, "udp") || network == "unixgram" {
			conn := proctest.Must(upg.PacketConn(network, addr))
			serve = append(serve, func() {
				datagram := make([]byte, 100)
				for {
					n, _, err := conn.ReadFrom(datagram)
					proctest.Must(n, err)
					proctest.Report("datagram", i, string(datagram[:n]))
				}
			})
			continue
		}
		ln := proctest.Must(upg.Listener(network, addr))
		if ln == nil {
			panic("nothing inherited as " + line)
		}
		serve = append(serve, func() {
			for {
				conn := proctest.Must(ln.Accept())
				proctest.Must(io.WriteString(conn, strconv.Itoa(i)))
				conn.Close()
			}
		})
	}
	MustBeReady(upg)
	proctest.Report("ready")
	for _, serve := range serve {
		go serve()
	}
	proctest.UntilKilled()
}
