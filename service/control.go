package service

import (
	"context"
	"errors"
	"fmt"

	"example.com/tableflip"
	"example.com/tableflip/control"
)

// This file owns what the control socket can ask of the process.

// An ask is for an upgrade or a rehearsal, for whose result somebody waits.
type ask struct {
	ctx    context.Context
	try    func(context.Context) error
	result chan<- error // holds one
}

func (p *process) openControl() (err error) {
	if p.opts.Control == "" {
		return nil
	}
	upg, ok := p.upg.(control.Upgrader)
	if !ok {
		return fmt.Errorf("service: Options.Control needs a control.Upgrader, which %T is not", p.upg)
	}
	p.control, err = control.New(controlled{upg, p}, p.opts.Control, control.Options{
		Logger:      p.opts.Logger,
		Connections: p.connections,
		Cut:         func() int { return int(p.cut.Load()) },
	})
	return err
}

// A controlled Upgrader does what the signals do.
type controlled struct {
	control.Upgrader
	p *process
}

func (c controlled) UpgradeContext(ctx context.Context) error { return c.p.ask(ctx, c.p.upgrade) }

func (c controlled) Rehearse(ctx context.Context) error {
	return c.p.ask(ctx, func(ctx context.Context) error { return c.p.afterCheck(ctx, c.Upgrader.Rehearse) })
}

func (c controlled) Stop() { c.p.told.tell(errors.New("service: stopped by the control socket")) }

func (p *process) closeControl() {
	if p.control != nil {
		p.control.Close()
	}
}

// connections returns how many the servers have of which that is known.
func (p *process) connections() (n int) {
	for _, f := range p.fronts {
		if f.connections != nil {
			n += f.connections()
		}
	}
	return n
}

// ask tries an upgrade or a rehearsal when none is under way, as a signal does, and
// returns how that went. It ends with ctx, and when the process is told to stop.
func (p *process) ask(ctx context.Context, try func(context.Context) error) error {
	if p.told.stop.Err() != nil {
		return tableflip.ErrStopped
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(p.told.stop, func() {
		cancel(fmt.Errorf("%w: %w", tableflip.ErrStopped, context.Cause(p.told.stop)))
	})()

	result := make(chan error, 1)
	select {
	case p.asks <- ask{ctx, try, result}:
		return <-result
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-p.upg.Exit():
		return p.upg.UpgradeContext(ctx) // which says why not
	}
}
