//go:build unix && cloudflare

package main

import (
	"context"
	"net/http"

	"github.com/cloudflare/tableflip"
)

type upgrader = tableflip.Upgrader

func newUpgrader(pidFile string) (*upgrader, error) {
	return tableflip.New(tableflip.Options{PIDFile: pidFile})
}

func newServer(srv *http.Server) *http.Server { return srv }

func shutdown(ctx context.Context, srv *http.Server, _ *upgrader) error { return srv.Shutdown(ctx) }
