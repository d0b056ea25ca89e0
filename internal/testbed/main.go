//go:build linux

// Command testbed upgrades a real server at random moments, with and without
// faults, under clients of many kinds at once, and counts what they lose.
//
//	go run . -upgrades 50 -faults 20 -duration 3m
//	go run . -library both -upgrades 25 -duration 90s
//	go run . -library mixed -upgrades 20 -duration 90s
//	go run . -trial 2s -acknowledge-timeout 500ms -only trial -upgrades 5 -faults 40
//	go run . -upgrades 0 -duration 10s
//	go run . -upgrades 20 -interleave 10s -duration 2m
//	go run . -in-a-row 10000 -duration 1h -grace 1ms
//
// It promises, and exits with status 1 if anything of this does not hold:
//
//   - No connection is refused, and no request is lost: on new, kept and slow
//     connections, over slow links (a round trip of 50 ms, 1 MiB/s), with bodies that
//     cannot be replayed, over HTTP/1, HTTP/2, gRPC, TLS and Unix sockets ("one-shot"
//     HTTP/2 clients send bodies that cannot be replayed side by side on one
//     connection). On a kept connection that holds for requests after a pause of less
//     than 80% of the idle grace (-grace); a longer one may meet a connection that the drain is
//     closing, and is counted as not promised if it fails. What a client waits for a processor
//     before its request has left makes the pause longer. Not promised is, too, what net/http's client
//     fails although it has sent nothing of it: see "What remains" of package httpdrain.
//   - A request with a deadline (-deadline) meets it. One that is late is counted as not promised if,
//     for at least half of that time, the servers or the clients waited for a processor, by the
//     kernel's account, or a server that serves was suspended by a fault.
//   - A TCP connection stays with the process that accepted it, until its client
//     ends it (which the clients here do within the drain deadline, -drain).
//   - A datagram that was sent is answered. Each client has at most four in flight,
//     so that the kernel has no reason to drop any.
//   - An upgrade to a process that fails leaves the old one in charge, and no answer
//     comes from the process that failed. The next upgrade succeeds.
//   - If the old process is killed during an upgrade, the new one carries on. What
//     the killed process had begun is lost in a crash, and counted as that, but
//     nothing that clients begin after its death, and no connection is refused.
//   - The old process drains and exits with status 0.
//   - After each upgrade the PID file names the process in charge, which answers on
//     its TCP and its Unix socket and is the only one that is left, zombies included.
//     It has no more descriptors open than other processes before it. No other file
//     is left.
//
// A fault happens to the old or to the new process, at any step of a handover (see
// package step): it is killed, or hangs, or is suspended for less or for longer than an
// acknowledgement may take. If the new process dies right after it has acknowledged, that
// is a crash in charge: the test-bed starts the service again, as a service manager would.
//
// With -trial, old and new serve side by side before the new one is in charge. Then a new
// process also fails, is stopped or killed meanwhile, or the upgrade is cancelled. The old one
// serves on, and a new one that lives drains, loses nothing, and exits. What a process that
// was killed on trial had begun is lost in a crash.
//
// In a mixed chain (-library mixed), versions of tableflip and of cloudflare/tableflip take
// turns. Nothing is promised of the descriptors and files that are left, nor after an upgrade in
// which the latter drains, except that it loses no more then than it loses alone, in
// a second run. Faults happen at the steps that both libraries have.
//
// The seed (-seed) repeats the plan: which faults, and when. It does not repeat
// what the scheduler makes of it.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() { os.Exit(realMain()) }

func realMain() int {
	cfg := config{}
	flag.StringVar(&cfg.library, "library", tableflip, "`what` the server uses: tableflip, service, cloudflare, both or mixed")
	flag.Uint64Var(&cfg.seed, "seed", 0, "seed of all that is random; 0 takes a new one")
	flag.IntVar(&cfg.upgrades, "upgrades", 10, "`number` of upgrades without a fault; 0, without faults, is a control run")
	flag.IntVar(&cfg.faultCount, "faults", 0, fmt.Sprintf("`number` of upgrades with a fault, of which there are %d", len((&config{library: tableflip}).faults())))
	flag.DurationVar(&cfg.duration, "duration", 25*time.Second, "least length of the run, over which the upgrades are spread")
	flag.DurationVar(&cfg.interleave, "interleave", 0, "length of phases without and with upgrades, which take turns; 0 is without")
	flag.IntVar(&cfg.clients, "clients", 1, "`number` of clients of each kind")
	flag.StringVar(&cfg.kinds, "kinds", "", "`words` separated by commas: only clients whose kind contains one of them")
	flag.DurationVar(&cfg.pace, "pace", 10*time.Millisecond, "mean pause of a client")
	flag.DurationVar(&cfg.deadline, "deadline", 200*time.Millisecond, "how long the clients wait whose requests have a deadline")
	flag.DurationVar(&cfg.grace, "grace", time.Second, "idle grace of the drain")
	flag.DurationVar(&cfg.drain, "drain", 20*time.Second, "drain deadline")
	flag.DurationVar(&cfg.upgradeTimeout, "upgrade-timeout", 4*time.Second, "how long a new process may take")
	flag.DurationVar(&cfg.acknowledgeTimeout, "acknowledge-timeout", time.Second, "how long a new process may take to acknowledge that it is in charge; less than half of -upgrade-timeout")
	flag.DurationVar(&cfg.trial, "trial", 0, "how long old and new serve side by side; more than two and a half -acknowledge-timeout")
	flag.IntVar(&cfg.inARow, "in-a-row", 0, "`number` of upgrades without clients and pauses, every other one with a kill at random, for -duration at most")
	flag.StringVar(&cfg.only, "only", "", "`text` that is in the name of all faults")
	flag.BoolVar(&cfg.early, "early", false, "with tableflip, too, accept before Ready, so that a fault after that may lose connections")
	keep := flag.Bool("keep", false, "keep the temporary directory")
	flag.Parse()
	if cfg.acknowledgeTimeout > cfg.upgradeTimeout/2 {
		fmt.Fprintln(os.Stderr, "testbed: -acknowledge-timeout is more than half of -upgrade-timeout")
		return 2
	}
	if cfg.trial != 0 && cfg.trial < cfg.acknowledgeTimeout*5/2 {
		fmt.Fprintln(os.Stderr, "testbed: -trial is less than two and a half -acknowledge-timeout")
		return 2
	}
	if cfg.trial != 0 && cfg.library != tableflip && cfg.library != service {
		fmt.Fprintf(os.Stderr, "testbed: there is no -trial with %s\n", cfg.library)
		return 2
	}
	libraries := []string{cfg.library}
	switch cfg.library {
	case "both":
		libraries = []string{tableflip, cloudflare}
	case mixture:
		libraries = []string{mixture, cloudflare} // to compare with
	case tableflip, service, cloudflare:
	default:
		fmt.Fprintf(os.Stderr, "testbed: there is no library %q\n", cfg.library)
		return 2
	}
	if cfg.seed == 0 {
		cfg.seed = rand.Uint64N(1e9)
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process, and thereby the servers

	status, isMixed := 0, cfg.library == mixture
	var beds []*bed
	for _, cfg.library = range libraries {
		if ctx.Err() != nil {
			break
		}
		if isMixed && cfg.library == cloudflare {
			cfg.faultCount = 0
		}
		b, bad, err := runOnce(ctx, cfg, *keep)
		if err != nil {
			fmt.Fprintln(os.Stderr, "testbed:", err)
			return 2
		}
		// In a comparison, the other library is expected to lose.
		if bad > 0 && (cfg.library != cloudflare || len(libraries) == 1) {
			status = 1
		}
		beds = append(beds, b)
	}
	if isMixed && len(beds) == 2 && !reportDrains(os.Stdout, beds[0], beds[1]) {
		status = 1
	}
	return status
}

func runOnce(ctx context.Context, cfg config, keep bool) (b *bed, bad int, err error) {
	dir, err := os.MkdirTemp("", "testbed")
	if err != nil {
		return nil, 0, err
	}
	if cfg.inARow > 0 {
		fmt.Printf("%s, seed %d: %d upgrades in a row, for at most %v\n", cfg.library, cfg.seed, cfg.inARow, cfg.duration)
	} else {
		fmt.Printf("%s, seed %d: %d upgrades and %d faults in at least %v\n", cfg.library, cfg.seed, cfg.upgrades, cfg.faultCount, cfg.duration)
	}
	b, err = run(ctx, cfg, dir)
	if b != nil && b.took > 0 {
		bad = b.report(os.Stdout)
	}
	if keep || bad > 0 || err != nil {
		fmt.Printf("the servers' log and files are in %s\n", dir)
		return b, bad, err
	}
	return b, bad, os.RemoveAll(dir)
}
