//go:build linux

// Command server is what the test-bed upgrades: HTTP/1, HTTP/2, TLS, Unix socket,
// raw TCP and UDP in one process. With the build tag "cloudflare" it uses
// github.com/cloudflare/tableflip in the way which that documents.
//
// It reports events on standard output, and ends when its standard input does, so
// that no server can outlive its test-bed.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"example.com/tableflip/internal/testbed/wire"
)

// version is written over in the binary, so it must be set by -ldflags -X.
var version = "version-unknown"

type config struct {
	tcp, tls, h2c, unix, echo, udp string // addresses
	cert, key                      string
	pidFile, faultFile             string
	upgradeTimeout, grace, drain   time.Duration
	acknowledgeTimeout             time.Duration
	trial                          time.Duration
	early, compat                  bool
}

func main() {
	var cfg config
	flag.StringVar(&cfg.tcp, "tcp", "", "`address` for HTTP/1")
	flag.StringVar(&cfg.tls, "tls", "", "`address` for HTTP/1 and HTTP/2 with TLS")
	flag.StringVar(&cfg.h2c, "h2c", "", "`address` for HTTP/2 without TLS")
	flag.StringVar(&cfg.unix, "unix", "", "`path` of a Unix socket for HTTP/1")
	flag.StringVar(&cfg.echo, "echo", "", "`address` for the TCP echo")
	flag.StringVar(&cfg.udp, "udp", "", "`address` for UDP")
	flag.StringVar(&cfg.cert, "cert", "", "PEM `file`")
	flag.StringVar(&cfg.key, "key", "", "PEM `file`")
	flag.StringVar(&cfg.pidFile, "pid-file", "", "`file` for the PID")
	flag.StringVar(&cfg.faultFile, "fault-file", "", "`file` that says which fault an upgrade has")
	flag.DurationVar(&cfg.upgradeTimeout, "upgrade-timeout", time.Minute, "how long a new process may take")
	flag.DurationVar(&cfg.acknowledgeTimeout, "acknowledge-timeout", 10*time.Second, "how long a new process may take to acknowledge that it is in charge")
	flag.DurationVar(&cfg.trial, "trial", 0, "how long a new process serves beside the old one before it is in charge")
	flag.DurationVar(&cfg.grace, "grace", time.Second, "idle grace of the drain")
	flag.DurationVar(&cfg.drain, "drain", 30*time.Second, "drain deadline")
	flag.BoolVar(&cfg.early, "early", earlyByCustom, "accept before Ready")
	flag.BoolVar(&cfg.compat, "compat", false, "upgrade to servers with cloudflare/tableflip, too")
	oneCall := flag.Bool("service", false, "use package service for HTTP")
	flag.Parse()

	signal.Notify(make(chan os.Signal, 1), syscall.SIGUSR1, syscall.SIGUSR2) // they may come too late
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))
	go func() {
		io.Copy(io.Discard, os.Stdin)
		slog.Error("the test-bed is gone")
		os.Exit(3)
	}()
	hookSteps(cfg)
	armChild(cfg.faultFile)
	serve := run
	if *oneCall {
		serve = runService
	}
	if err := serve(cfg); err != nil {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
	report(wire.Drained, nil)
}

// service is something that accepts and drains.
type service interface {
	// serve returns when the service is stopped by drain, or fails.
	serve() error
	// drain returns when everything that was begun is finished, or ctx is done.
	drain(ctx context.Context) error
}

func run(cfg config) error {
	hangup, terminate := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	signal.Notify(terminate, syscall.SIGTERM)

	reached(wire.BeforeNew)
	upg, err := newUpgrader(cfg)
	if err != nil {
		return err
	}
	defer upg.Stop()
	// Exit is closed before Upgrade returns, whose outcome is reported.
	var upgrades sync.WaitGroup
	defer upgrades.Wait()
	go func() {
		for {
			select {
			case <-hangup:
				upgrades.Go(func() { upgrade(upg, cfg) })
			case <-terminate:
				upg.Stop()
			}
		}
	}()
	report(wire.Created, nil)
	reached(wire.AfterNew)

	services, err := listen(upg, cfg)
	if err != nil {
		return err
	}
	reached(wire.Claimed)

	failed := make(chan error, len(services))
	accept := func() {
		for _, s := range services {
			go func() {
				if err := s.serve(); err != nil {
					failed <- err
				}
			}()
		}
	}
	if cfg.early {
		accept()
	}
	reached(wire.BeforeReady)
	if err := upg.Ready(); err != nil {
		return fmt.Errorf("ready: %w", err)
	}
	if !cfg.early {
		accept()
	}
	go reportCharge()

	hook := make(chan os.Signal, 1)
	signal.Notify(hook, syscall.SIGUSR2)
	select {
	case <-hook:
		fail(upg)
		<-upg.Exit()
	case <-upg.Exit():
	case err := <-failed:
		return err
	}
	return drain(services, cfg.drain)
}

// reportCharge is called once Ready has returned nil.
func reportCharge() {
	if ended := trialEnded(); !isClosed(ended) {
		report(wire.OnTrial, nil)
		<-ended
	}
	if !wasUndone() {
		disarm()
		report(wire.Ready, nil)
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// upgrade is cancelled by SIGUSR1.
func upgrade(upg *upgrader, cfg config) {
	armParent(cfg.faultFile)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGUSR1)
	defer stop()
	if err := upgradeContext(ctx, upg); err != nil {
		slog.Error("upgrade failed", "error", err)
		report(wire.UpgradeFailed, err)
		return
	}
	report(wire.Upgraded, nil)
}

func drain(services []service, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	errs := make(chan error, len(services))
	var wait sync.WaitGroup
	for _, s := range services {
		wait.Go(func() { errs <- s.drain(ctx) })
	}
	wait.Wait()
	for range services {
		if err := <-errs; err != nil {
			return err
		}
	}
	return nil
}

func listen(upg *upgrader, cfg config) ([]service, error) {
	var services []service
	for _, l := range []struct {
		network, addr string
		make          func(net.Listener) (service, error)
	}{
		{"tcp", cfg.tcp, func(ln net.Listener) (service, error) { return newHTTP(upg, cfg, ln, plain) }},
		{"tcp", cfg.h2c, func(ln net.Listener) (service, error) { return newHTTP(upg, cfg, ln, cleartextHTTP2) }},
		{"tcp", cfg.tls, func(ln net.Listener) (service, error) { return newHTTP(upg, cfg, ln, withTLS) }},
		{"unix", cfg.unix, func(ln net.Listener) (service, error) { return newHTTP(upg, cfg, ln, plain) }},
		{"tcp", cfg.echo, func(ln net.Listener) (service, error) { return &echo{ln: ln}, nil }},
	} {
		ln, err := upg.Listen(l.network, l.addr)
		if err != nil {
			return nil, err
		}
		s, err := l.make(ln)
		if err != nil {
			return nil, err
		}
		services = append(services, s)
	}
	conn, err := upg.ListenPacket("udp", cfg.udp)
	if err != nil {
		return nil, err
	}
	return append(services, newDatagrams(conn)), nil
}

var reports sync.Mutex

// report tells the test-bed. The line is shorter than PIPE_BUF, so that those of
// several processes do not mix.
func report(step string, cause error) {
	e := wire.Event{Step: step}
	if cause != nil {
		e.Error = cause.Error()
	}
	reportEvent(e)
}

func reportEvent(e wire.Event) {
	e.PID, e.At = os.Getpid(), time.Now()
	e.Version, _ = wire.ParseVersion(version)
	line, _ := json.Marshal(e)
	reports.Lock()
	defer reports.Unlock()
	os.Stdout.Write(append(line, '\n'))
}
