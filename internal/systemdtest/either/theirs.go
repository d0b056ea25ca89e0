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

// ready tells first. The parent ends once the child is ready, and if systemd does not know
// the child by then, the service ends with the parent.
func ready(upg *upgrader) error {
	if err := tell(); err != nil {
		return err
	}
	return upg.Ready()
}

func newServer(srv *http.Server) *http.Server { return srv }

func shutdown(ctx context.Context, srv *http.Server, _ *upgrader) error { return srv.Shutdown(ctx) }
