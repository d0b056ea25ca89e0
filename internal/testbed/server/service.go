//go:build linux && !cloudflare

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/tableflip/internal/testbed/wire"
	oneCall "example.com/tableflip/service"
)

// runService is run, with package service for what is HTTP.
func runService(cfg config) error {
	reached(wire.BeforeNew)
	upg, err := newUpgrader(cfg)
	if err != nil {
		return err
	}
	report(wire.Created, nil)
	reached(wire.AfterNew)
	watched := &watchedUpgrader{upgrader: upg, faultFile: cfg.faultFile}
	ln, err := upg.Listen("tcp", cfg.echo)
	if err != nil {
		return err
	}
	conn, err := upg.ListenPacket("udp", cfg.udp)
	if err != nil {
		return err
	}
	watched.others = []service{&echo{ln: ln}, newDatagrams(conn)}

	cert, err := tls.LoadX509KeyPair(cfg.cert, cfg.key)
	if err != nil {
		return err
	}
	cleartext := new(http.Protocols)
	cleartext.SetUnencryptedHTTP2(true)
	drained := make(chan error, 1)
	go func() {
		<-upg.Exit()
		if !watched.ready.Load() {
			drained <- nil
			return
		}
		drained <- drain(watched.others, cfg.drain)
	}()
	err = oneCall.Run(watched, oneCall.Options{DrainTimeout: cfg.drain, IdleGrace: cfg.grace, Healthy: healthy},
		oneCall.HTTP(&http.Server{Addr: cfg.tcp, Handler: handler(), ReadHeaderTimeout: 20 * time.Second}),
		oneCall.HTTP(&http.Server{Addr: cfg.unix, Handler: handler(), ReadHeaderTimeout: 20 * time.Second}),
		oneCall.HTTP(&http.Server{Addr: cfg.h2c, Handler: handler(), Protocols: cleartext}),
		oneCall.HTTP(&http.Server{Addr: cfg.tls, Handler: handler(), TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}}}),
	)
	if err != nil && !errors.Is(err, errInjected) {
		return err
	}
	return <-drained
}

// healthy is false once SIGUSR2 has come.
func healthy(ctx context.Context) error {
	hook := make(chan os.Signal, 1)
	signal.Notify(hook, syscall.SIGUSR2)
	defer signal.Stop(hook)
	select {
	case <-hook:
		return errInjected
	case <-ctx.Done():
		return nil
	}
}

// watchedUpgrader reports what it is called for, and has the fault's last steps.
type watchedUpgrader struct {
	*upgrader
	faultFile string
	others    []service
	claimed   int
	ready     atomic.Bool
}

// Listen is called once for each of the four servers.
func (u *watchedUpgrader) Listen(network, addr string) (net.Listener, error) {
	ln, err := u.upgrader.Listen(network, addr)
	if u.claimed++; u.claimed == 4 {
		reached(wire.Claimed)
	}
	return ln, err
}

// Ready has the fault before Ready, and starts the other services after it.
func (u *watchedUpgrader) Ready() error {
	reached(wire.BeforeReady)
	if err := u.upgrader.Ready(); err != nil {
		return err
	}
	for _, s := range u.others {
		go s.serve()
	}
	u.ready.Store(true)
	go reportCharge()
	return nil
}

// UpgradeContext reports how it went, and may have the fault of a parent. SIGUSR1 cancels it.
func (u *watchedUpgrader) UpgradeContext(ctx context.Context) error {
	armParent(u.faultFile)
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGUSR1)
	defer stop()
	err := u.upgrader.UpgradeContext(ctx)
	if err != nil {
		report(wire.UpgradeFailed, err)
	} else {
		report(wire.Upgraded, nil)
	}
	return err
}
