//go:build linux

package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"example.com/tableflip/internal/testbed/proc"
	"example.com/tableflip/internal/testbed/wire"
)

// This file owns what the test-bed checks of a server, from outside, after each
// upgrade.

// settleLimit is how long events may take that nobody waits for, such as the reaping of a
// process, or the closing of a descriptor after the end of the old process.
const settleLimit = 5 * time.Second

// verify checks that the right process is in charge, alone, and answers. If there is
// none it starts one.
func (b *bed) verify(r *row, parentVersion int) {
	want := b.version
	if r.outcome == refused {
		want = parentVersion
	}
	if n := b.created(); n > 1 {
		r.breaks("%d upgrades at a time", n)
	}
	pid, version := b.chain.current()
	if pid == 0 {
		r.breaks("no process is in charge")
		b.restart(r)
		return
	}
	if version != want {
		r.breaks("version %d is in charge, not %d", version, want)
	}
	b.verifyFiles(r, pid)
	for _, socket := range []struct{ network, addr string }{{"tcp", b.target.tcp}, {"unix", b.target.unix}} {
		if version, err := b.probe(socket.network, socket.addr); err != nil {
			r.breaks("%s: the service does not answer: %v", socket.network, err)
		} else if version != want {
			r.breaks("%s: version %d answers, not %d", socket.network, version, want)
		}
	}
	if !b.chain.await(settleLimit, func() bool { return len(b.strays(pid)) == 0 }) {
		r.breaks("there are other processes than %d, which is in charge: %v", pid, b.strays(pid))
	}
	if b.isOurs() {
		b.verifyDescriptors(r, pid)
	}
}

// created returns how many processes of the new version have called New.
func (b *bed) created() (n int) {
	b.chain.mu.Lock()
	defer b.chain.mu.Unlock()
	for _, p := range b.chain.processes {
		if p.version == b.version && p.reported(wire.Created) {
			n++
		}
	}
	return n
}

// verifyFiles checks that the PID file names a process, and that no other file is left.
func (b *bed) verifyFiles(r *row, pid int) {
	text, err := os.ReadFile(b.pidFile())
	if named, _ := strconv.Atoi(strings.TrimSpace(string(text))); named != pid {
		r.breaks("the PID file says %q (%v), and %d is in charge", text, err, pid)
	}
	for _, dir := range []string{filepath.Dir(b.pidFile()), filepath.Dir(b.target.unix)} {
		entries, err := os.ReadDir(dir)
		if len(entries) != 1 && b.isOurs() {
			r.breaks("%s holds %v (%v), want one file", filepath.Base(dir), entries, err)
		}
	}
}

// strays returns the servers that run, or are zombies, except for one.
func (b *bed) strays(inCharge int) []proc.Process {
	return slices.DeleteFunc(b.chain.servers(), func(p proc.Process) bool { return p.PID == inCharge })
}

// verifyDescriptors checks that a process has no more descriptors open than the process
// with the fewest before it. First generations are compared only with first generations.
func (b *bed) verifyDescriptors(r *row, pid int) {
	b.chain.mu.Lock()
	isFirst := b.chain.processes[pid].isFirst
	b.chain.mu.Unlock()
	fewest := &b.files.later
	if isFirst {
		fewest = &b.files.first
	}

	more := make(map[string]int)
	ok := b.chain.await(settleLimit, func() bool {
		files, err := proc.Files(pid)
		if err != nil {
			return false
		}
		if *fewest == nil {
			*fewest = files
		}
		clear(more)
		for kind, n := range files {
			if _, known := (*fewest)[kind]; !known && proc.IsSocket(kind) {
				(*fewest)[kind] = n
			}
			if n > (*fewest)[kind] {
				more[kind] = n - (*fewest)[kind]
			}
		}
		for kind, n := range *fewest {
			if now, isOpen := files[kind]; isOpen || !proc.IsSocket(kind) {
				(*fewest)[kind] = min(n, now)
			}
		}
		return len(more) == 0
	})
	if !ok {
		r.breaks("descriptors are lost: %v", more)
	}
}

// checkHung checks that an old process that hangs in its Upgrade still serves unless
// another may.
func (b *bed) checkHung(r *row, parentVersion int) {
	f := r.fault.injected
	isSelf := f.Victim == wire.Parent && b.injected().PID == b.injected().Victim
	if at := r.fault.moment(); !isSelf || at == racing || at == inCharge || r.fault.hasTrial && at != beforeReady {
		return
	}
	if version, err := b.probe("tcp", b.target.tcp); err != nil || version != parentVersion {
		r.breaks("while the upgrade hangs, version %d answers (%v), not %d", version, err, parentVersion)
	}
}

// probe asks the server once, on a new connection.
func (b *bed) probe(network, addr string) (version int, err error) {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dial}, Timeout: 10 * time.Second}
	resp, err := client.Get("http://testbed/?id=7&n=100")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	return check(resp, got, wire.Content(7, 100))
}
