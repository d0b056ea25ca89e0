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
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/httpdrain"
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
		err = service.Run(upg, service.Options{IdleGrace: 200 * time.Millisecond}, &http.Server{
			Addr: filepath.Join(directory, "socket"),
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				if err == nil {
					fmt.Fprintf(w, "%d %s", os.Getpid(), body)
				}
			}),
		})
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

func TestUpgradesUnderLoadAndStops(t *testing.T) {
	directory := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), directoryVariable+"="+directory, "GORACE=atexit_sleep_ms=0")
	if testing.Verbose() {
		cmd.Stderr = os.Stderr
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	pids := map[int]bool{cmd.Process.Pid: true}
	t.Cleanup(func() {
		for pid := range pids {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		<-ended
	})
	until(t, "the first generation serves", func() bool { return pidIn(directory) == cmd.Process.Pid })

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var answered atomic.Int64
	var clients sync.WaitGroup
	for i := range 4 {
		transport := &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(directory, "socket"))
			},
			DisableKeepAlives: i%2 == 0,
		}
		defer transport.CloseIdleConnections()
		client := &http.Client{Transport: transport}
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
		pids[pidIn(directory)] = true
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

// A supervisor that stops the service also tells the process that was replaced.
func TestFirstSignalAfterAnUpgradeDoesNotCut(t *testing.T) {
	upg, err := stub.New()
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "socket")
	asked, answer := make(chan struct{}), make(chan struct{})
	server := &http.Server{Addr: socket, Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		close(asked)
		<-answer
	})}
	replaced := make(chan struct{})
	ran := make(chan error, 1)
	go func() {
		ran <- service.Run(exitedUpgrader{upg, replaced}, service.Options{IdleGrace: time.Millisecond, Logger: slog.New(slog.DiscardHandler)}, server)
	}()
	var conn net.Conn
	until(t, "the service listens", func() bool {
		conn, err = net.Dial("unix", socket)
		return err == nil
	})
	defer conn.Close()
	if err := httptest.NewRequest(http.MethodGet, "/", nil).Write(conn); err != nil {
		t.Fatal(err)
	}
	<-asked
	close(replaced) // as if it had been replaced
	until(t, "it accepts no more", func() bool {
		refused, err := net.Dial("unix", socket)
		if err == nil {
			refused.Close()
		}
		return err != nil
	})
	// The test hears the signal too, and later than the service was sent it.
	heard := make(chan os.Signal, 1)
	signal.Notify(heard, syscall.SIGTERM)
	defer signal.Stop(heard)
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-heard
	close(answer)
	if err := <-ran; err != nil {
		t.Errorf("got %v", err)
	}
}

type exitedUpgrader struct {
	*stub.Upgrader
	exit chan struct{}
}

func (upg exitedUpgrader) Exit() <-chan struct{} { return upg.exit }

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

func TestDrainTimeoutCuts(t *testing.T) {
	upg, err := stub.New()
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "socket")
	asked := make(chan struct{})
	server := &http.Server{Addr: socket, Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(asked)
		<-r.Context().Done()
	})}
	ran := make(chan error, 1)
	go func() {
		ran <- service.Run(upg, service.Options{DrainTimeout: time.Millisecond, Logger: slog.New(slog.DiscardHandler)}, server)
	}()
	var conn net.Conn
	until(t, "the service listens", func() bool {
		conn, err = net.Dial("unix", socket)
		return err == nil
	})
	defer conn.Close()
	if err := httptest.NewRequest(http.MethodGet, "/", nil).Write(conn); err != nil {
		t.Fatal(err)
	}
	<-asked
	upg.Stop()
	var cut *httpdrain.CutError
	if err := <-ran; !errors.As(err, &cut) || cut.Connections != 1 {
		t.Errorf("got %v, want one connection cut", err)
	}
}
