//go:build linux && cloudflare

package main

import (
	"context"
	"net"
	"net/http"

	"github.com/cloudflare/tableflip"
)

type upgrader = tableflip.Upgrader

// earlyByCustom is what the example of tableflip does: Serve, then Ready.
const earlyByCustom = true

func newUpgrader(cfg config) (*upgrader, error) {
	return tableflip.New(tableflip.Options{PIDFile: cfg.pidFile, UpgradeTimeout: cfg.upgradeTimeout})
}

func upgradeContext(_ context.Context, upg *upgrader) error { return upg.Upgrade() }

// That library has no trials.
func fail(*upgrader) {}

func trialEnded() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

func wasUndone() bool { return false }

type httpService struct {
	srv *http.Server
	ln  net.Listener
}

func newHTTPService(_ *upgrader, srv *http.Server, ln net.Listener, _ config) *httpService {
	return &httpService{srv, ln}
}

func (s *httpService) serve() error {
	serve := s.srv.Serve
	if s.srv.TLSConfig != nil {
		serve = func(ln net.Listener) error { return s.srv.ServeTLS(ln, "", "") }
	}
	if err := serve(s.ln); err != http.ErrServerClosed {
		return err
	}
	return nil
}

func (s *httpService) drain(ctx context.Context) error { return s.srv.Shutdown(ctx) }
