//go:build unix && !aix

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// This file asks whether the service survives upgrades under load. Copy it beside the
// main package of yours: it needs nothing else. Change start to how your service is
// started, and exchange to what its clients do.

// patience bounds every wait. The test does not pass because of it.
const patience = 30 * time.Second

func TestUpgradesUnderLoad(t *testing.T) {
	c := start(t)
	var stop atomic.Bool
	var answered atomic.Int64
	var clients sync.WaitGroup
	defer clients.Wait()
	defer stop.Store(true)
	for i := range 4 {
		clients.Go(func() {
			client := c.client(i%2 == 0)
			defer client.CloseIdleConnections()
			for !stop.Load() {
				body := fmt.Sprintf("client %d, request %d", i, answered.Load())
				if err := exchange(client, body); err != nil {
					t.Errorf("%s: %v", body, err)
					return
				}
				answered.Add(1)
			}
		})
	}

	for range 3 {
		before, old := answered.Load(), c.pid()
		until(t, "requests are answered", func() bool { return t.Failed() || answered.Load() > before+20 })
		// Again and again, because an upgrade is refused while the process before
		// this one drains.
		until(t, "the process is replaced", func() bool {
			syscall.Kill(old, syscall.SIGHUP)
			time.Sleep(50 * time.Millisecond) // a poll
			return c.pid() != old
		})
	}
	t.Logf("%d requests were answered", answered.Load())
}

// A chain is all generations of the service.
type chain struct{ socket, pidFile string }

// start starts the service, and waits until it is ready. At the end of the test it
// is stopped.
func start(t *testing.T) *chain {
	t.Helper()
	dir := t.TempDir()
	c := &chain{filepath.Join(dir, "socket"), filepath.Join(dir, "pid")}
	binary := filepath.Join(dir, "service")
	if output, err := exec.Command("go", "build", "-o", binary).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	cmd := exec.Command(binary, "-listen", c.socket, "-pid-file", c.pidFile)

	// Each generation inherits this pipe, which ends with the last one.
	log, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = write
	err = cmd.Start()
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	go cmd.Wait()
	ended := make(chan string, 1)
	go func() {
		text, _ := io.ReadAll(log)
		ended <- string(text)
	}()
	t.Cleanup(func() {
		if pid := c.pid(); pid != 0 { // which would be this process's group
			syscall.Kill(pid, syscall.SIGTERM)
		}
		select {
		case text := <-ended:
			if t.Failed() {
				t.Log(text)
			}
		case <-time.After(patience):
			t.Error("the service did not stop")
		}
	})
	until(t, "the service is ready", func() bool { return c.pid() == cmd.Process.Pid })
	return c
}

// pid is that of the process in charge, or 0 if there is none.
func (c *chain) pid() int {
	content, _ := os.ReadFile(c.pidFile)
	pid, _ := strconv.Atoi(string(content))
	return pid
}

func (c *chain) client(keepAlive bool) *http.Client {
	return &http.Client{Timeout: patience, Transport: &http.Transport{
		DisableKeepAlives: !keepAlive,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", c.socket)
		},
	}}
}

// exchange sends one request. net/http cannot send its body twice, so that it does not
// hide a lost one.
func exchange(client *http.Client, body string) error {
	response, err := client.Post("http://service/", "text/plain", io.MultiReader(strings.NewReader(body)))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && string(answer) != body {
		err = fmt.Errorf("status %s, answer %q", response.Status, answer)
	}
	return err
}

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) { // a poll
		if time.Now().After(end) {
			t.Fatalf("waited too long until %s", what)
		}
	}
}
