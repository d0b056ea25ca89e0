//go:build linux

package handover

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file is the driver's side of a chain: a line of processes, each started
// by an upgrade of the one before. All of them share one standard input, from
// which the generation in charge reads commands, and one standard output, on
// which it answers. generation.go is the other side.

// patience bounds every wait for a peer. Nothing passes because of it.
const patience = 30 * time.Second

// A Chain is driven by one goroutine.
type Chain struct {
	Serving Serving // the generation in charge

	first    *exec.Cmd
	commands *os.File
	output   *os.File
	answers  *bufio.Reader // of output
	early    []string      // answers that came before those that were waited for
}

// Start starts the first generation of c, which listens on n TCP listeners and one
// UDP socket, and waits until it serves. The binary must call Main.
func Start(binary string, c Contender, n int) (*Chain, error) { return startChain(binary, c, n, 0) }

// StartDraining does what Start does, with this library and one listener. It allows for
// so many generations that drain when an upgrade begins: each does until all connections to
// it, which Keep opens, have ended.
func StartDraining(binary string, maxDraining int) (*Chain, error) {
	return startChain(binary, Ours, 1, maxDraining)
}

func startChain(binary string, c Contender, n, maxDraining int, more ...string) (*Chain, error) {
	commandsRead, commandsWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer commandsRead.Close()
	answersRead, answersWrite, err := os.Pipe()
	if err != nil {
		commandsWrite.Close()
		return nil, err
	}
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), contenderVariable+"="+string(c), countVariable+"="+strconv.Itoa(n),
		drainingVariable+"="+strconv.Itoa(maxDraining), hostVariable+"="+host())
	cmd.Env = append(cmd.Env, more...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = commandsRead, answersWrite, os.Stderr
	ch := &Chain{first: cmd, commands: commandsWrite, output: answersRead, answers: bufio.NewReader(answersRead)}
	err = cmd.Start()
	answersWrite.Close()
	if err != nil {
		commandsWrite.Close()
		answersRead.Close()
		return nil, err
	}
	if err := ch.awaitServing(); err != nil {
		return nil, errors.Join(err, ch.Close())
	}
	return ch, nil
}

// host returns a loopback address, so that each chain has its own. Of 127.0.0.1, too
// few ports may be free: a connection that its client closed first, in whatever ran
// before, keeps its port for a minute (TIME_WAIT in tcp(7)).
func host() string {
	return fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
}

// Close ends the generation in charge and waits for its end.
func (ch *Chain) Close() error {
	ch.commands.Close() // a generation without commands exits
	err := ch.awaitEnd()
	ch.output.Close()
	ch.first.Process.Kill()
	ch.first.Wait()
	return err
}

// A Timing is what one upgrade took.
type Timing struct {
	Ready  time.Duration // from the command to the child's call of Ready
	Commit time.Duration // from the command to when Exit was closed
	Serve  time.Duration // from the command to the return of the child's Ready
	Call   time.Duration // the call of Upgrade in the parent
}

// Upgrade replaces the generation in charge. When it returns, the next one serves, and
// that process has exited, unless it may drain.
func (ch *Chain) Upgrade() (t Timing, err error) {
	begin := monotonic()
	if err := ch.command(commandUpgrade); err != nil {
		return t, err
	}
	var called, committed, returned int64
	if err := ch.answer(upgradedFormat, &called, &committed, &returned); err != nil {
		return t, err
	}
	if err := ch.awaitServing(); err != nil {
		return t, err
	}
	return Timing{
		Ready:  time.Duration(ch.Serving.ready - begin),
		Commit: time.Duration(committed - begin),
		Serve:  time.Duration(ch.Serving.served - begin),
		Call:   time.Duration(returned - called),
	}, nil
}

// UpgradeInARow replaces k generations without a pause: each calls Upgrade when its
// parent has exited. It returns the time from the first call to the last return.
func (ch *Chain) UpgradeInARow(k int) (time.Duration, error) {
	if err := ch.command(slices.Repeat([]byte{commandUpgrade}, k)...); err != nil {
		return 0, err
	}
	first, last := int64(math.MaxInt64), int64(0)
	for range k {
		var called, committed, returned int64
		if err := ch.answer(upgradedFormat, &called, &committed, &returned); err != nil {
			return 0, err
		}
		first, last = min(first, called), max(last, returned)
		if err := ch.awaitServing(); err != nil {
			return 0, err
		}
	}
	return time.Duration(last - first), nil
}

// CPU returns the CPU time that the generation in charge has used.
func (ch *Chain) CPU() (time.Duration, error) {
	if err := ch.command(commandCPU); err != nil {
		return 0, err
	}
	var nanoseconds int64
	err := ch.answer("cpu %d\n", &nanoseconds)
	return time.Duration(nanoseconds), err
}

func (ch *Chain) command(commands ...byte) error {
	_, err := ch.commands.Write(commands)
	return err
}

func (ch *Chain) awaitServing() error {
	s := &ch.Serving
	*s = Serving{}
	return ch.answer(servingFormat, &s.PID, &s.Inherited, &s.TCP, &s.UDP, &s.ready, &s.served)
}

// answer waits for the next line that begins with the first word of format.
func (ch *Chain) answer(format string, values ...any) error {
	line, err := ch.next(format[:strings.Index(format, " ")+1])
	if err != nil {
		return fmt.Errorf("waiting for %q: %w", strings.TrimSpace(format), err)
	}
	if _, err := fmt.Sscanf(line, format, values...); err != nil {
		return fmt.Errorf("waiting for %q: got %q: %w", strings.TrimSpace(format), line, err)
	}
	return nil
}

// next returns the next line with this prefix, and keeps others for later: parent and
// child write to the same pipe, in an order that only WaitForParent could ensure.
func (ch *Chain) next(prefix string) (string, error) {
	wanted := func(line string) bool { return strings.HasPrefix(line, prefix) }
	if i := slices.IndexFunc(ch.early, wanted); i >= 0 {
		line := ch.early[i]
		ch.early = slices.Delete(ch.early, i, i+1)
		return line, nil
	}
	ch.output.SetReadDeadline(time.Now().Add(patience))
	for {
		line, err := ch.answers.ReadString('\n')
		if err != nil || wanted(line) {
			return line, err
		}
		ch.early = append(ch.early, line)
	}
}

// awaitEnd waits until no process of the chain has its standard output open.
func (ch *Chain) awaitEnd() error {
	ch.output.SetReadDeadline(time.Now().Add(patience))
	_, err := io.Copy(io.Discard, ch.answers)
	if err != nil && ch.Serving.PID > 0 {
		syscall.Kill(ch.Serving.PID, syscall.SIGKILL)
		return fmt.Errorf("process %d did not exit: %w", ch.Serving.PID, err)
	}
	return err
}

// DescriptorsFor returns how many descriptors a process may need for n listeners:
// in a child that is about to be started, the parent's duplicates and the listeners,
// and os/exec's own duplicates of what is passed on.
func DescriptorsFor(n int) int { return 3*n + 50 }

// MostListeners returns the largest n that the limit of open files allows.
func MostListeners() (int, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, err
	}
	return (int(min(uint64(limit.Cur), 1<<30)) - DescriptorsFor(0)) / 3, nil
}
