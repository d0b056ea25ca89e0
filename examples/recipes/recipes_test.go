// Package recipes_test shows service.Run beside what else runs a program's parts.
package recipes_test

import (
	"context"
	"log"
	"net/http"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
	"github.com/oklog/run"
	"go.uber.org/fx"
)

// With github.com/oklog/run, service.Run is one actor. It hears the signals, so that the
// group needs no signal handler. The other actors are interrupted once it has drained; if
// one of them ends first, upg.Stop has it drain.
func Example_oklogRun() {
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	var group run.Group
	group.Add(func() error {
		return service.Run(upg, service.Options{}, service.HTTP(&http.Server{Addr: ":8080"}))
	}, func(error) { upg.Stop() })
	ctx, cancel := context.WithCancel(context.Background())
	group.Add(func() error { return refresh(ctx) }, func(error) { cancel() })
	if err := group.Run(); err != nil {
		log.Fatal(err)
	}
}

// With go.uber.org/fx, service.Run begins when everything else has been started, and has
// drained before anything else is stopped: append its hook last. When it returns, because of
// an upgrade, a signal or an error, it ends the application. Fx hears SIGTERM and SIGINT,
// too, and then waits for StopTimeout, which must be longer than the drain.
func Example_fx() {
	serve := func(lifecycle fx.Lifecycle, end fx.Shutdowner, upg *tableflip.Upgrader, server *http.Server) {
		ran := make(chan error, 1)
		lifecycle.Append(fx.Hook{
			OnStart: func(context.Context) error {
				go func() {
					ran <- service.Run(upg, service.Options{DrainTimeout: 30 * time.Second}, service.HTTP(server))
					end.Shutdown()
				}()
				return nil
			},
			OnStop: func(context.Context) error {
				upg.Stop()
				return <-ran
			},
		})
	}
	newUpgrader := func() (*tableflip.Upgrader, error) { return tableflip.New(tableflip.Options{}) }
	newServer := func() *http.Server { return &http.Server{Addr: ":8080"} }
	fx.New(fx.Provide(newUpgrader, newServer), fx.Invoke(serve), fx.StopTimeout(time.Minute)).Run()
}

// refresh is what else the program does, in every generation.
func refresh(ctx context.Context) error {
	<-ctx.Done()
	return nil
}
