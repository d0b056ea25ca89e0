//go:build unix && !cloudflare

package main

import (
	"context"
	"log/slog"
	"net/http"

	"example.com/tableflip"
	"example.com/tableflip/httpdrain"
)

type upgrader = tableflip.Upgrader

func newUpgrader(pidFile string) (*upgrader, error) {
	return tableflip.New(tableflip.Options{PIDFile: pidFile, Compat: true, Logger: slog.Default()})
}

func newServer(srv *http.Server) *httpdrain.Drainer { return httpdrain.New(srv) }

func shutdown(ctx context.Context, d *httpdrain.Drainer, upg *upgrader) error {
	d.Replaced = upg.Replaced()
	return d.Shutdown(ctx)
}
