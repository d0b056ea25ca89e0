// Command tableflip-supervise runs a service and stays in place while the service's
// generations come and go: as a container's ENTRYPOINT, under another supervisor, or in
// a terminal.
//
//	tableflip-supervise [flags] -- server [arguments]
//
// It forwards signals to the main process of the service, so that SIGHUP upgrades and
// SIGTERM stops it, and ends with the main process's exit status. The flag -h lists the
// flags. The documentation of package supervise describes what the command follows,
// which signals it forwards, and how it ends.
package main

import (
	"flag"
	"fmt"
	"log/slog"
	"os"

	"example.com/tableflip/supervise"
)

const usage = `usage: tableflip-supervise [flags] -- server [arguments]

Runs the server, forwards signals to its main process, which upgrades replace (it
follows MAINPID on NOTIFY_SOCKET), reaps orphans, and ends when the service has.

Flags:
`

const statuses = `
Exit status: the main process's, 128+n if signal n killed it; 127 if the server was
not found, 126 if it could not be executed, 125 if the supervisor could not start.
`

func main() {
	var s supervise.Supervisor
	quiet := flag.Bool("quiet", false, "log only what goes wrong")
	flag.DurationVar(&s.StopTimeout, "stop-timeout", supervise.DefaultStopTimeout, "how long older generations and stray processes may live on after the main process")
	flag.DurationVar(&s.TakeoverTimeout, "takeover-timeout", supervise.DefaultTakeoverTimeout, "how long to wait for the new process if the old one dies during an upgrade")
	flag.StringVar(&s.PIDFile, "pid-file", "", "`file` that names the next main process when one has ended, for servers without NOTIFY_SOCKET")
	parentDeath := flag.String("parent-death", "", "`signal` that the supervisor gets when the process that started it ends, like tini's -p: TERM stops the service (Linux)")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), usage)
		flag.PrintDefaults()
		fmt.Fprint(flag.CommandLine.Output(), statuses)
	}
	flag.CommandLine.Init(os.Args[0], flag.ContinueOnError)
	switch err := flag.CommandLine.Parse(os.Args[1:]); {
	case err == flag.ErrHelp:
		os.Exit(0)
	case err == nil && flag.NArg() == 0:
		flag.Usage()
		fallthrough
	case err != nil:
		os.Exit(supervise.StatusFailed)
	}
	s.Command = flag.Args()
	if *parentDeath != "" {
		if err := setParentDeath(*parentDeath); err != nil {
			fmt.Fprintln(os.Stderr, "-parent-death:", err)
			os.Exit(supervise.StatusFailed)
		}
	}

	level := slog.LevelInfo
	if *quiet {
		level = slog.LevelWarn
	}
	s.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})).With("supervisor", os.Getpid())
	status, err := s.Run()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(status)
}
