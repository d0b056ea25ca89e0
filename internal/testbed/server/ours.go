//go:build linux && !cloudflare

package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"

	"example.com/tableflip"
	"example.com/tableflip/httpdrain"
	"example.com/tableflip/internal/trial"
)

type upgrader = tableflip.Upgrader

// earlyByCustom is false because a child that fails takes with it what it has
// accepted.
const earlyByCustom = false

func newUpgrader(cfg config) (*upgrader, error) {
	return tableflip.New(tableflip.Options{
		PIDFile:        cfg.pidFile,
		UpgradeTimeout: cfg.upgradeTimeout,
		Compat:         cfg.compat,
		Trial:          cfg.trial,
		Logger:         slog.Default(),
	})
}

func upgradeContext(ctx context.Context, upg *upgrader) error { return upg.UpgradeContext(ctx) }

var errInjected = errors.New("injected failure")

// fail is for a process on trial.
func fail(upg *upgrader) { upg.Fail(errInjected) }

func trialEnded() <-chan struct{} { return trial.Ended() }
func wasUndone() bool             { return trial.WasUndone() }

type httpService struct {
	upg     *upgrader
	srv     *http.Server
	drainer *httpdrain.Drainer
	ln      net.Listener
}

func newHTTPService(upg *upgrader, srv *http.Server, ln net.Listener, cfg config) *httpService {
	drainer := httpdrain.New(srv)
	drainer.IdleGrace = cfg.grace
	return &httpService{upg, srv, drainer, ln}
}

func (s *httpService) serve() error {
	serve := s.drainer.Serve
	if s.srv.TLSConfig != nil {
		serve = func(ln net.Listener) error { return s.drainer.ServeTLS(ln, "", "") }
	}
	if err := serve(s.ln); err != http.ErrServerClosed {
		return err
	}
	return nil
}

func (s *httpService) drain(ctx context.Context) error {
	s.drainer.Replaced = s.upg.Replaced()
	return s.drainer.Shutdown(ctx)
}
