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

// ready tells last: the library has told systemd before the parent ends.
func ready(upg *upgrader) error {
	if err := upg.Ready(); err != nil {
		return err
	}
	return tell()
}

func newServer(srv *http.Server) *httpdrain.Drainer { return httpdrain.New(srv) }

func shutdown(ctx context.Context, d *httpdrain.Drainer, upg *upgrader) error {
	d.Replaced = upg.Replaced()
	return d.Shutdown(ctx)
}
