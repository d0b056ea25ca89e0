package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// orders are what signals, and the control socket, tell the process.
type orders struct {
	upgrade <-chan os.Signal  // holds one, however many have come
	stop    context.Context   // ends with the first SIGTERM or SIGINT
	now     context.Context   // ends with the second SIGINT
	tell    func(cause error) // ends stop as a signal does
	forget  func()            // gives the signals back, and ends both
}

func hear(upgrades []os.Signal, logger *slog.Logger) *orders {
	if len(upgrades) == 0 {
		upgrades = []os.Signal{hangup}
	}
	// One channel for each, so that no number of one keeps out another.
	upgrade, terminate, interrupt := make(chan os.Signal, 1), make(chan os.Signal, 1), make(chan os.Signal, 2)
	signal.Notify(upgrade, upgrades...)
	signal.Notify(terminate, syscall.SIGTERM)
	signal.Notify(interrupt, os.Interrupt)

	stop, tellStop := context.WithCancelCause(context.Background())
	now, tellNow := context.WithCancelCause(context.Background())
	go func() {
		for interrupts := 0; interrupts < 2; {
			select {
			case sig := <-terminate:
				tellStop(fmt.Errorf("service: stopped by %v", sig))
			case sig := <-interrupt:
				if interrupts++; interrupts == 1 {
					go logger.Info("interrupted", "again", "cuts what is in progress") // A log can be stuck.
				}
				tellStop(fmt.Errorf("service: stopped by %v", sig))
			case <-now.Done():
				return
			}
		}
		tellNow(errors.New("service: interrupted twice"))
	}()
	return &orders{upgrade, stop, now, tellStop, func() {
		for _, signals := range []chan os.Signal{upgrade, terminate, interrupt} {
			signal.Stop(signals)
		}
		tellStop(nil)
		tellNow(nil)
	}}
}
