//go:build unix

package process_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/proctest"
)

func init() {
	// streams changes its standard streams in a way, and starts a process with them.
	proctest.Role("streams", func() {
		way, dir, _ := strings.Cut(proctest.Arg(), " ")
		cmd := &exec.Cmd{Path: os.Args[0], Args: os.Args[:1]}
		cmd.Env = append(os.Environ(), proctest.Environment("stream"), proctest.WithArg(dir))
		var chosen *os.File
		var fds []uintptr
		read, write, pipeErr := os.Pipe()
		proctest.Must(0, pipeErr)

		switch way {
		case "variables":
			os.Stdin, os.Stdout, os.Stderr = read, write, write
		case "closed":
			for fd := range 3 {
				proctest.Must(0, unix.Close(fd))
			}
		case "taken":
			// The next files that this process opens get these numbers.
			for fd := range 3 {
				proctest.Must(0, unix.Close(fd))
			}
			read, write, pipeErr = os.Pipe()
			proctest.Must(0, pipeErr)
			if read.Fd() > 2 || write.Fd() > 2 {
				panic("these are no standard streams' numbers")
			}
			if third := proctest.Must(os.Open(dir)); third.Fd() > 2 {
				panic("nor is this")
			}
			fds = []uintptr{write.Fd(), read.Fd()}
		case "replaced":
			// As a daemon does it, after it has closed them by another way.
			other := proctest.Must(os.Open(filepath.Join(dir, "in")))
			os.Stdin.Close()
			proctest.Must(unix.FcntlInt(other.Fd(), unix.F_DUPFD, 0))
			other = proctest.Must(os.OpenFile(filepath.Join(dir, "other"), os.O_RDWR, 0))
			os.Stdout.Close()
			proctest.Must(unix.FcntlInt(other.Fd(), unix.F_DUPFD, 1))
		case "chosen":
			// Close-on-exec, as all that package os opens.
			chosen = proctest.Must(os.OpenFile(filepath.Join(dir, "other"), os.O_RDWR, 0))
		case "chosen-variable":
			os.Stdout = proctest.Must(os.OpenFile(filepath.Join(dir, "other"), os.O_RDWR, 0))
			chosen = os.Stdout
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = process.Streams()
		if chosen != nil {
			cmd.Stdout = chosen
		}
		p := proctest.Must(process.Start(context.Background(), cmd, fds, false))
		<-p.Exited()
		proctest.Must(0, p.Err())
	})

	// stream writes down what its standard streams are.
	proctest.Role("stream", func() {
		names := map[string]string{"null": os.DevNull}
		for _, name := range []string{"in", "out", "err", "other"} {
			names[name] = filepath.Join(proctest.Arg(), name)
		}
		var got []string
		for _, file := range []*os.File{os.Stdin, os.Stdout, os.Stderr} {
			is := "unknown"
			info := proctest.Must(file.Stat())
			for name, path := range names {
				if os.SameFile(info, proctest.Must(os.Stat(path))) {
					is = name
				}
			}
			got = append(got, is)
		}
		proctest.Must(0, os.WriteFile(filepath.Join(proctest.Arg(), "result"), []byte(strings.Join(got, " ")), 0o600))
	})
}

func TestStartStreams(t *testing.T) {
	for _, test := range []struct{ way, want string }{
		{"variables", "in out err"},
		{"closed", "null null null"},
		{"taken", "null null null"},
		{"replaced", "in other err"},
		{"chosen", "in other err"},
		{"chosen-variable", "in other err"},
	} {
		t.Run(test.way, func(t *testing.T) {
			dir := t.TempDir()
			files := map[string]*os.File{}
			for _, name := range []string{"in", "out", "err", "other"} {
				file, err := os.Create(filepath.Join(dir, name))
				proctest.OK(t, err)
				defer file.Close()
				files[name] = file
			}
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), proctest.Environment("streams"), proctest.WithArg(test.way+" "+dir))
			cmd.Stdin, cmd.Stdout, cmd.Stderr = files["in"], files["out"], files["err"]
			if err := cmd.Run(); err != nil {
				said, _ := os.ReadFile(filepath.Join(dir, "err"))
				t.Fatalf("%v: %s", err, said)
			}
			got, err := os.ReadFile(filepath.Join(dir, "result"))
			proctest.OK(t, err)
			if string(got) != test.want {
				t.Errorf("descriptors 0 to 2 are %s, want %s", got, test.want)
			}
		})
	}
}
