//go:build unix

package handovertest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// In these tests, methods are called concurrently.

func TestRaceReadyStop(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	for range 100 {
		upg := NewUpgrader(t, tableflip.Options{PIDFile: path})
		var all sync.WaitGroup
		for range 2 {
			all.Go(func() {
				if err := upg.Ready(); err != nil && !errors.Is(err, tableflip.ErrStopped) {
					t.Errorf("Ready: %v", err)
				}
			})
			all.Go(upg.Stop)
		}
		proctest.Within(t, "Ready and Stop", proctest.Waited(&all))
		if proctest.Exists(path) {
			t.Fatal("the PID file is there after Stop")
		}
	}
}

// Whatever is called at the same time, each result is one that the documentation
// names, nothing blocks for ever, and no descriptor is lost.
func TestRaceAll(t *testing.T) {
	upg, _ := NewParent(t, tableflip.Options{Command: proctest.Shell("exit 7")}, "fail")
	proctest.OK(t, upg.Ready())
	// A test's first network call opens descriptors that stay.
	proctest.Connect(t)
	proctest.WithoutGC(t)
	if err := upg.Upgrade(); err == nil {
		t.Fatal("no error")
	}
	descriptors := proctest.OpenDescriptors()

	// isEnd reports whether err says that it is time to end.
	isEnd := func(err error, allowed ...error) bool {
		if err == nil || slices.ContainsFunc(allowed, func(want error) bool { return errors.Is(err, want) }) {
			return false
		}
		if !errors.Is(err, tableflip.ErrStopped) {
			t.Errorf("unexpected: %v", err)
		}
		return true
	}
	var all sync.WaitGroup
	repeat := func(call func(i int) (end bool)) {
		for range 2 {
			all.Go(func() {
				for i := 0; !call(i); i++ {
				}
			})
		}
	}
	var upgrades atomic.Int32
	enough := make(chan struct{})
	repeat(func(int) bool {
		err := upg.Upgrade()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			if upgrades.Add(1) == 5 {
				close(enough)
			}
			return false
		}
		if err == nil {
			t.Error("an upgrade succeeded")
		}
		return isEnd(err, tableflip.ErrUpgradeInProgress)
	})
	repeat(func(int) bool {
		ln, err := upg.Listen("tcp", "localhost:0")
		if err != nil {
			return isEnd(err)
		}
		defer ln.Close()
		return isEnd(upg.RemoveListener("tcp", "localhost:0"))
	})
	repeat(func(int) bool {
		conn, err := upg.ListenPacket("udp", "localhost:0")
		if err != nil {
			return isEnd(err)
		}
		defer conn.Close()
		return isEnd(upg.RemovePacketConn("udp", "localhost:0"))
	})
	repeat(func(i int) bool {
		fileName := strconv.Itoa(i % 3)
		return isEnd(upg.AddFile(fileName, os.Stderr)) || isEnd(upg.RemoveFile(fileName), os.ErrNotExist)
	})
	repeat(func(int) bool {
		_, filesErr := upg.Files()
		_, connErr := upg.Conn("tcp", "x")
		return isEnd(filesErr) || isEnd(connErr)
	})
	repeat(func(int) bool {
		if err := upg.WaitForParent(context.Background()); err != nil || upg.HasParent() {
			t.Error(err, upg.HasParent())
		}
		return isEnd(upg.Ready()) || proctest.IsClosed(upg.Exit())
	})
	proctest.Within(t, "5 upgrades", enough)
	for range 4 {
		all.Go(upg.Stop)
	}
	proctest.Within(t, "all goroutines", proctest.Waited(&all))
	if now := proctest.OpenDescriptors(); now > descriptors {
		t.Errorf("%d descriptors are open, and %d were before", now, descriptors)
	}
}

// The child gets a descriptor that was added successfully during an upgrade, and does not
// get one that was removed.
func TestRaceRegistry(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "list-files")
	proctest.OK(t, upg.Ready())
	var mu sync.Mutex
	passedOn := map[string]bool{}
	note := func(fileName string, held bool, err error) (ended bool) {
		if err == nil {
			mu.Lock()
			passedOn[fileName] = held
			mu.Unlock()
		} else if !errors.Is(err, tableflip.ErrUpgraded) {
			t.Error(err)
		}
		return err != nil
	}
	var all sync.WaitGroup
	for worker := range 4 {
		all.Go(func() {
			for i := 0; ; i++ {
				fileName := fmt.Sprint(worker, ".", i%5)
				if note(fileName, true, upg.AddFile(fileName, os.Stderr)) {
					return
				}
				if i%2 == 0 && note(fileName, false, upg.RemoveFile(fileName)) {
					return
				}
			}
		})
	}
	proctest.OK(t, upg.Upgrade())
	proctest.Within(t, "all goroutines", proctest.Waited(&all))
	var want []string
	for fileName, held := range passedOn {
		if held {
			want = append(want, "fd:"+fileName+":")
		}
	}
	slices.Sort(want)
	if got := s.Await("files").Text; got != fmt.Sprintf("%q", want) {
		t.Errorf("the child got %s, want %q", got, want)
	}
}

// Each inherited descriptor is claimed once.
func TestRaceClaims(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "claim-at-once")
	var want []string
	for i := range 20 {
		ln := proctest.Opened[net.Listener](t)(upg.Listen("tcp", "localhost:0"))
		proctest.OK(t, upg.AddFile(strconv.Itoa(i), os.Stderr))
		want = append(want, ln.Addr().String(), fmt.Sprintf("fd:%d:", i))
	}
	slices.Sort(want)
	Upgrade(t, upg)
	if got := s.Await("claimed").Text; got != fmt.Sprint(want) {
		t.Errorf("claimed %s, want %v", got, want)
	}
}

func init() {
	proctest.Role("claim-at-once", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		var all sync.WaitGroup
		claimed := make(chan string, 1000)
		for i := range 4 {
			all.Go(func() {
				for ln := proctest.Must(upg.Listener("tcp", "localhost:0")); ln != nil; ln = proctest.Must(upg.Listener("tcp", "localhost:0")) {
					claimed <- ln.Addr().String()
				}
			})
			all.Go(func() {
				for j := range 5 {
					if file := proctest.Must(upg.File(strconv.Itoa(i + j))); file != nil {
						claimed <- file.Name()
					}
				}
				for _, file := range proctest.Must(upg.Files()) {
					claimed <- file.Name()
				}
			})
		}
		all.Wait()
		close(claimed)
		names := slices.Sorted(func(yield func(string) bool) {
			for claim := range claimed {
				yield(claim)
			}
		})
		for range 3 {
			all.Go(func() { MustBeReady(upg) })
		}
		all.Wait()
		proctest.Report("claimed", names)
	})
}
