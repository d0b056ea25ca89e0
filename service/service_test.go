//go:build unix

package service_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
	stub "example.com/tableflip/testing"
)

// The tests' services are this binary, started again with the directory of their
// socket and PID file.
const directoryVariable = "SERVICE_TEST_DIRECTORY"

// patience bounds every wait for an event. No test passes because of it.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	directory := os.Getenv(directoryVariable)
	if directory == "" {
		os.Exit(m.Run())
	}
	upg, err := tableflip.New(tableflip.Options{PIDFile: filepath.Join(directory, "pid")})
	if err == nil {
		server := &http.Server{
			Addr: filepath.Join(directory, "socket"),
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				if err == nil {
					fmt.Fprintf(w, "%d %s", os.Getpid(), body)
				}
			}),
		}
		if flaw, err := os.ReadFile(filepath.Join(directory, "flaw")); err == nil {
			flaws[string(flaw)].put(server)
		}
		err = service.Run(upg, service.Options{IdleGrace: 200 * time.Millisecond}, server)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// until calls done until it reports true.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(patience)
	for !done() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("waited too long until %s", what)
		}
	}
}

func pidIn(directory string) int {
	content, _ := os.ReadFile(filepath.Join(directory, "pid"))
	pid, _ := strconv.Atoi(string(content))
	return pid
}

// A post is a request whose body cannot be sent twice, so that no client repeats it.
func post(ctx context.Context, client *http.Client, body string) (answer string, err error) {
	reader, writer := io.Pipe()
	go func() {
		io.WriteString(writer, body)
		writer.Close()
	}()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://service/", reader)
	if err != nil {
		return "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	return string(content), err
}

// startProcess starts a first generation, and waits until it serves.
func startProcess(t *testing.T, directory string, stderr io.Writer) (first int) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), directoryVariable+"="+directory, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		if pid := pidIn(directory); pid != 0 {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		cmd.Process.Kill()
		<-ended
	})
	until(t, "the first generation serves", func() bool { return pidIn(directory) == cmd.Process.Pid })
	return cmd.Process.Pid
}

// unixClient returns a client of the service in a directory.
func unixClient(directory string, keepAlive bool) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(directory, "socket"))
		},
		DisableKeepAlives: !keepAlive,
	}}
}

func TestUpgradesUnderLoadAndStops(t *testing.T) {
	directory := t.TempDir()
	stderr := io.Discard
	if testing.Verbose() {
		stderr = os.Stderr
	}
	startProcess(t, directory, stderr)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var answered atomic.Int64
	var clients sync.WaitGroup
	for i := range 4 {
		client := unixClient(directory, i%2 == 1)
		defer client.CloseIdleConnections()
		clients.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				body := fmt.Sprintf("client %d request %d", i, n)
				answer, err := post(context.WithoutCancel(ctx), client, body)
				var pid int
				if err == nil {
					_, err = fmt.Sscanf(answer, "%d", &pid)
				}
				if err != nil || answer != fmt.Sprint(pid, " ", body) {
					t.Errorf("keep-alive %t: answer %q, error %v", i%2 == 1, answer, err)
					return
				}
				answered.Add(1)
			}
		})
	}
	for range 3 {
		old := pidIn(directory)
		before := answered.Load()
		until(t, "requests are answered", func() bool { return answered.Load() > before+20 })
		syscall.Kill(old, syscall.SIGHUP)
		until(t, "the next generation is in charge", func() bool { return pidIn(directory) != old })
		until(t, "the old generation has ended", func() bool { return syscall.Kill(old, 0) != nil })
	}
	cancel()
	clients.Wait()

	last := pidIn(directory)
	syscall.Kill(last, syscall.SIGTERM)
	until(t, "the last generation has ended", func() bool { return syscall.Kill(last, 0) != nil })
	if left, err := os.ReadDir(directory); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestListenErrorLeavesNothingOpen(t *testing.T) {
	taken, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	upg, err := stub.New()
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "socket")
	err = service.Run(upg, service.Options{}, &http.Server{Addr: socket}, &http.Server{Addr: taken.Addr().String()})
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v, want that the address is in use", err)
	}
	if _, err := net.Dial("unix", socket); err == nil {
		t.Error("the first listener is still open")
	}
	<-upg.Exit()
}

// brokenListener fails to accept.
type brokenListener struct{ net.Listener }

var errBroken = errors.New("broken")

func (ln brokenListener) Accept() (net.Conn, error) { return nil, errBroken }

type brokenUpgrader struct{ *stub.Upgrader }

func (upg brokenUpgrader) Listen(network, addr string) (net.Listener, error) {
	ln, err := upg.Upgrader.Listen(network, addr)
	return brokenListener{ln}, err
}

func TestServeErrorStopsTheService(t *testing.T) {
	upg, err := stub.New()
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Addr: "localhost:0", ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	err = service.Run(brokenUpgrader{upg}, service.Options{Logger: slog.New(slog.DiscardHandler)}, server)
	if !errors.Is(err, errBroken) {
		t.Errorf("got %v, want %v", err, errBroken)
	}
}

type unreadyUpgrader struct{ *stub.Upgrader }

func (unreadyUpgrader) Ready() error { return errBroken }

func TestReadyErrorStopsTheService(t *testing.T) {
	upg, err := stub.New()
	if err != nil {
		t.Fatal(err)
	}
	err = service.Run(unreadyUpgrader{upg}, service.Options{Logger: slog.New(slog.DiscardHandler)}, &http.Server{Addr: "localhost:0"})
	if !errors.Is(err, errBroken) {
		t.Errorf("got %v, want %v", err, errBroken)
	}
}
