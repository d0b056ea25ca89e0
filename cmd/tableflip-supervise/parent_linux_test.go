package main

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
)

func TestParentDeath(t *testing.T) {
	for _, signal := range []string{"TERM", "SIGTERM", "15"} {
		t.Run(signal, func(t *testing.T) {
			t.Parallel()
			// The shell's input ends it, and its end stops the service, which is the
			// last to have the pipe open.
			cmd := exec.Command("sh", "-c", `"$@" </dev/null & read line`, "sh", os.Args[0], "-parent-death", signal, "--", "sleep", "60")
			cmd.Env = append(os.Environ(), proctest.Environment("command"))
			cmd.WaitDelay = time.Second
			input, err := cmd.StdinPipe()
			proctest.OK(t, err)
			read, write, err := os.Pipe()
			proctest.OK(t, err)
			defer read.Close()
			cmd.Stderr = write
			err = cmd.Start()
			write.Close()
			proctest.OK(t, err)
			defer cmd.Wait()
			defer input.Close()
			output := bufio.NewReader(read)
			for line := ""; !strings.Contains(line, "msg=started"); {
				if line, err = output.ReadString('\n'); err != nil {
					t.Fatal(err)
				}
			}
			input.Close()
			read.SetReadDeadline(time.Now().Add(proctest.Patience)) // sleep ends later
			rest, err := io.ReadAll(output)
			if err != nil || !strings.Contains(string(rest), "signal=SIGTERM") {
				t.Errorf("%v\n%s", err, rest)
			}
		})
	}
}
