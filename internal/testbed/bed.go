//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"example.com/tableflip/internal/load"
)

// The libraries that the server can be built with.
const (
	tableflip  = "tableflip"
	service    = "service" // the same, by package service
	cloudflare = "cloudflare"
	mixture    = "mixed" // versions of tableflip and cloudflare take turns
)

// turns are the libraries of a mixed chain, over and over.
var turns = []string{cloudflare, tableflip, tableflip, cloudflare, tableflip}

// config is what the flags say.
type config struct {
	library                      string
	seed                         uint64
	upgrades, faultCount         int
	duration, interleave         time.Duration
	clients                      int
	kinds                        string
	pace, deadline               time.Duration
	grace, drain, upgradeTimeout time.Duration
	acknowledgeTimeout, trial    time.Duration
	early                        bool
	inARow                       int
	only                         string // these faults
}

// bed is one run: a server, its clients, and what happens to them.
type bed struct {
	config
	dir       string            // for everything that the run writes
	binaries  map[string][]byte // of the server, as built, by the library
	version   int               // last one installed
	libraries []string          // by version
	turn      int               // of a mixed chain
	target    target
	chain     *chain
	record    *recorder
	kindNames []string // of the clients, in the report's order
	began     time.Time
	took      time.Duration
	rows      []*row
	broken    []string // promises, other than those in rows

	// files is how many descriptors of each kind a process had open, at the fewest.
	files struct{ first, later map[string]int } // generations
}

// run makes a run in dir. The error is one of the test-bed; what the library does
// wrong is in the bed.
func run(ctx context.Context, cfg config, dir string) (*bed, error) {
	b := &bed{config: cfg, dir: dir, record: newRecorder(cfg.grace, cfg.deadline), binaries: make(map[string][]byte)}
	var err error
	for _, library := range slices.Compact(slices.Sorted(slices.Values(b.turns()))) {
		if b.binaries[library], err = build(ctx, library, dir); err != nil {
			return nil, err
		}
	}
	linked, cut := context.WithCancel(context.Background())
	defer cut()
	args, err := b.arguments(linked)
	if err != nil {
		return nil, err
	}
	log, err := os.Create(b.logPath())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if err := b.install(); err != nil {
		return nil, err
	}
	if b.chain, err = newChain(b.path("server"), args, log); err != nil {
		return nil, err
	}
	err = b.chain.start()
	if err == nil {
		b.turn++
		b.work(ctx)
	}
	if stopErr := b.chain.stop(b.drain + 10*time.Second); stopErr != nil {
		b.broken = append(b.broken, "at the end: "+stopErr.Error())
	}
	b.checkVersions()
	if _, statErr := os.Lstat(b.pidFile()); b.isOurs() && statErr == nil {
		b.broken = append(b.broken, "at the end: the PID file is left behind")
	}
	return b, err
}

// turns returns the libraries that the versions use, in turn.
func (b *bed) turns() []string {
	if b.library == mixture {
		return turns
	}
	return []string{b.library}
}

// isOurs reports whether no version uses cloudflare/tableflip, which leaves more behind.
func (b *bed) isOurs() bool { return b.library != cloudflare && b.library != mixture }

// install puts the next version into place. Whoever has its turn keeps it until a version
// of it has been in charge.
func (b *bed) install() error {
	b.version = len(b.libraries)
	all := b.turns()
	library := all[b.turn%len(all)]
	b.libraries = append(b.libraries, library)
	return install(b.binaries[library], b.path("server"), b.version)
}

func (b *bed) logPath() string { return b.path("servers.log") }

// arguments prepares what the servers need, and returns their arguments. The slow links to
// them last until ctx is done.
func (b *bed) arguments(ctx context.Context) ([]string, error) {
	addrs, err := load.FreeAddresses(5)
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{filepath.Dir(b.pidFile()), b.path("sockets")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
	}
	roots, err := load.WriteCertificate(b.dir)
	if err != nil {
		return nil, err
	}
	b.target = target{
		tcp: addrs[0], tls: addrs[1], h2c: addrs[2], unix: b.path("sockets/web"), echo: addrs[3], udp: addrs[4],
		roots: roots, pace: b.pace, grace: b.grace, deadline: b.deadline,
	}
	if b.target.slowTCP, err = slowLink.Listen(ctx, b.target.tcp); err != nil {
		return nil, err
	}
	if b.target.slowH2C, err = slowLink.Listen(ctx, b.target.h2c); err != nil {
		return nil, err
	}
	args := []string{
		"-tcp", b.target.tcp, "-tls", b.target.tls, "-h2c", b.target.h2c,
		"-unix", b.target.unix, "-echo", b.target.echo, "-udp", b.target.udp,
		"-cert", b.path(load.CertFile), "-key", b.path(load.KeyFile),
		"-pid-file", b.pidFile(), "-fault-file", b.path("fault"),
		"-upgrade-timeout", b.upgradeTimeout.String(), "-acknowledge-timeout", b.acknowledgeTimeout.String(),
		"-trial", b.trial.String(), "-grace", b.grace.String(), "-drain", b.drain.String(),
	}
	if b.library == service {
		args = append(args, "-service")
	}
	if b.library == mixture {
		args = append(args, "-compat")
	}
	if b.early {
		args = append(args, "-early")
	}
	return args, nil
}

// work runs the clients, and the plan under them.
func (b *bed) work(ctx context.Context) {
	working, stopWorking := context.WithCancel(ctx)
	b.began = time.Now()
	defer func() { b.took = time.Since(b.began) }()
	random := rand.New(rand.NewPCG(b.seed, 0))
	if b.inARow > 0 {
		defer stopWorking()
		for _, a := range b.planInARow(random) {
			if ctx.Err() != nil || time.Since(b.began) > b.duration {
				break
			}
			b.rows = append(b.rows, b.perform(a))
		}
		return
	}

	kinds := selected(b.target.kinds(b.clients), b.kinds)
	for _, k := range kinds {
		b.kindNames = append(b.kindNames, k.Name)
	}
	clients := load.Start(working, kinds, b.seed, b.record.add)
	go b.tellPhases(working)
	watching, stopWatching := context.WithCancel(context.Background())
	var watch sync.WaitGroup
	watch.Go(func() { b.record.watchStalls(watching, b.chain.living) })
	for _, a := range b.plan(random) {
		if !load.Sleep(ctx, b.wait(a)) {
			break
		}
		b.rows = append(b.rows, b.perform(a))
	}
	load.Sleep(ctx, b.duration-time.Since(b.began))
	stopWorking()
	clients.Wait()
	stopWatching()
	watch.Wait()
}

// phaseAt returns the phase at a time since the beginning, and when it ends.
func (b *bed) phaseAt(t time.Duration) (p phase, end time.Duration) {
	if b.interleave == 0 {
		if b.upgrades+b.faultCount == 0 {
			return control, b.duration
		}
		return upgraded, b.duration
	}
	n := t / b.interleave
	if n%2 == 0 {
		return control, (n + 1) * b.interleave
	}
	return upgraded, (n + 1) * b.interleave
}

// wait returns how long to wait for an attempt.
func (b *bed) wait(a attempt) time.Duration {
	now := time.Since(b.began)
	p, end := b.phaseAt(max(now, a.at))
	if p == control {
		return end - now
	}
	return a.at - now
}

func (b *bed) tellPhases(ctx context.Context) {
	for {
		p, end := b.phaseAt(time.Since(b.began))
		b.record.enter(p)
		if !load.Sleep(ctx, max(end-time.Since(b.began), time.Millisecond)) {
			return
		}
		if b.interleave == 0 {
			return
		}
	}
}

// checkVersions looks for answers of processes that were never in charge. Those with
// cloudflare/tableflip accept before they are.
func (b *bed) checkVersions() {
	b.chain.mu.Lock()
	defer b.chain.mu.Unlock()
	b.record.mu.Lock()
	defer b.record.mu.Unlock()
	for kind, k := range b.record.kinds {
		for version, n := range k.versions {
			if !b.chain.served[version] && (b.library != mixture || b.libraries[version] != cloudflare) {
				b.broken = append(b.broken, fmt.Sprintf("%s: %d answers of version %d, which was never in charge", kind, n, version))
			}
		}
	}
}
