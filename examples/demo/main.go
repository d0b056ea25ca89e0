// Command demo upgrades a web server under load, and counts what gets lost.
//
//	go run ./examples/demo
//
// It builds examples/http as v1 and as v2, starts v1, and has clients send
// requests without a break. Meanwhile it replaces the running binary by the other
// version and asks for an upgrade at the server's control socket, again and again, and
// shows the steps. At the end it prints which generation served how many requests. The
// exit status is 0 only if every upgrade succeeded and every request was answered by a
// process that was in charge or was draining.
//
// Run it in the repository, because it needs the go command and the source. It leaves
// nothing behind, even if it is interrupted.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"time"
)

type options struct {
	upgrades int
	interval time.Duration
	clients  int
}

func main() {
	var opts options
	flag.IntVar(&opts.upgrades, "upgrades", 10, "how `many` times to upgrade the server")
	flag.DurationVar(&opts.interval, "interval", time.Second, "how long to wait before each upgrade")
	flag.IntVar(&opts.clients, "clients", 16, "how `many` clients send requests; every other one keeps its connection")
	flag.Parse()
	if flag.NArg() > 0 || opts.upgrades < 0 || opts.interval < 0 || opts.clients < 1 {
		flag.Usage()
		os.Exit(2)
	}
	if !supported {
		fmt.Fprintln(os.Stderr, "demo: upgrades are not supported on this platform")
		os.Exit(1)
	}

	ctx, stop := signal.NotifyContext(context.Background(), endSignals...)
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	surviveBrokenPipe()
	out := stopOnError{os.Stdout, cancel}

	if err := run(ctx, opts, out, isTerminal(os.Stdout)); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// run returns once all that it has started has ended, whatever the reason.
func run(ctx context.Context, opts options, out io.Writer, terminal bool) (err error) {
	dir, err := os.MkdirTemp("", "tableflip-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	progress := newProgress(out, terminal)
	defer progress.end()

	progress.say("building v1 and v2 of examples/http")
	versions := []string{"v1", "v2"}
	binaries := map[string]string{}
	for _, version := range versions {
		binaries[version] = filepath.Join(dir, version)
		if err := build(ctx, binaries[version], version); err != nil {
			return cmp.Or(context.Cause(ctx), err)
		}
	}

	srv, err := startServer(ctx, dir, binaries[versions[0]], versions[0], usualBounds)
	if err != nil {
		return err
	}
	stopWatching, err := srv.watch(func(step string) { progress.say("  %s", step) })
	if err != nil {
		return errors.Join(err, srv.stop())
	}
	defer stopWatching()
	first := srv.generations[0]
	load := startLoad("http://"+srv.addr, opts.clients)
	progress.count(load)
	progress.say("generation 1: %s, PID %d, on %s", first.version, first.pid, srv.addr)

	upgradeErr := upgradeUnderLoad(ctx, opts, srv, progress, versions, binaries)
	tally := load.stop()
	stopErr := srv.stop()
	progress.end()
	return errors.Join(upgradeErr, stopErr, report(out, srv.generations, tally))
}

// upgradeUnderLoad goes through all upgrades, with time for the load before,
// between and after them.
func upgradeUnderLoad(ctx context.Context, opts options, srv *server, progress *progress, versions []string, binaries map[string]string) error {
	for n := range opts.upgrades {
		if err := srv.run(ctx, opts.interval); err != nil {
			return err
		}
		version := versions[(n+1)%len(versions)]
		if err := srv.install(binaries[version]); err != nil {
			return err
		}
		progress.say("upgrade %d of %d: to %s", n+1, opts.upgrades, version)
		next, err := srv.upgrade(ctx, version)
		if err != nil {
			return fmt.Errorf("upgrade %d of %d, to %s: %w", n+1, opts.upgrades, version, err)
		}
		progress.say("generation %d: %s, PID %d, Upgrade took %s", len(srv.generations), version, next.pid, shorten(next.took))
	}
	if err := srv.run(ctx, opts.interval); err != nil {
		return err
	}
	return srv.log.firstError()
}
