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
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/service"
	stub "example.com/tableflip/testing"
)

func TestMain(m *testing.M) { proctest.Main(m) }

func init() { proctest.Role("serve", serveRole) }

// maxDrainingVariable is for Options.MaxDraining of the generations.
const maxDrainingVariable = "SERVICETEST_MAXDRAINING"

// trialVariable is for Options.Trial of the generations. A file "short" makes it short.
const trialVariable = "SERVICETEST_TRIAL"

// serveRole is a server whose Arg is the directory of its socket and PID file.
func serveRole() {
	proctest.OpenWire()
	directory := proctest.Arg()
	maxDraining, _ := strconv.Atoi(os.Getenv(maxDrainingVariable))
	trial, _ := time.ParseDuration(os.Getenv(trialVariable))
	if trial > 0 {
		step.ExitGrace = time.Second // which passes, because a child drains that was on trial
	}
	proctest.When(step.ReadyReceived, func() {
		if proctest.Exists(filepath.Join(directory, "short")) {
			step.MaxTrial = time.Millisecond
		}
	})
	upg, err := tableflip.New(tableflip.Options{PIDFile: filepath.Join(directory, "pid"), MaxDraining: maxDraining, Trial: trial})
	if err == nil {
		server := &http.Server{
			Addr: filepath.Join(directory, "socket"),
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if load.ServeHeld(w, r) {
					return
				}
				body, err := io.ReadAll(r.Body)
				if err == nil {
					fmt.Fprintf(w, "%d %s", os.Getpid(), body)
				}
			}),
		}
		if flaw, err := os.ReadFile(filepath.Join(directory, "flaw")); err == nil {
			flaws[string(flaw)].put(server)
		}
		err = service.Run(upg, service.Options{
			IdleGrace:    5 * time.Second, // for clients on a busy machine
			DrainTimeout: time.Hour,
			WaitHijacked: true,
			Control:      filepath.Join(directory, "ctl"),
			Healthy: func(context.Context) error {
				if proctest.Exists(filepath.Join(directory, "unhealthy")) {
					return errors.New("out of order")
				}
				proctest.Report("healthy")
				return nil
			},
		}, service.HTTP(server))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
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

// startService starts a first generation, and waits until it serves. Without stderr,
// what the service logs is dropped.
func startService(t *testing.T, directory string, stderr *os.File, env ...string) (*proctest.Service, *proctest.Process) {
	t.Helper()
	s := proctest.NewService(t)
	cmd := s.Command("serve", append(env, s.Wire(), proctest.WithArg(directory))...)
	cmd.Stderr = nil
	if stderr != nil {
		cmd.Stderr = stderr
	}
	s.Start(cmd)
	first := s.Next()
	awaitCharge(t, directory, first)
	return s, first
}

// awaitCharge waits until a generation has taken over.
func awaitCharge(t *testing.T, directory string, p *proctest.Process) {
	t.Helper()
	proctest.AwaitThat(t, "the generation is in charge", func() bool { return pidIn(directory) == p.PID })
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

// startClients has clients at work until end is called.
func startClients(t *testing.T, directory string) (answered *atomic.Int64, end func()) {
	ctx, cancel := context.WithCancel(t.Context())
	answered = new(atomic.Int64)
	var clients sync.WaitGroup
	for i := range 4 {
		client := unixClient(directory, i%2 == 1)
		clients.Go(func() {
			defer client.CloseIdleConnections()
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
	end = sync.OnceFunc(func() {
		cancel()
		clients.Wait()
	})
	t.Cleanup(end)
	return answered, end
}

func TestUpgradesUnderLoadAndStops(t *testing.T) {
	directory := proctest.SocketDir(t)
	var stderr *os.File
	if testing.Verbose() {
		stderr = os.Stderr
	}
	s, current := startService(t, directory, stderr)
	answered, end := startClients(t, directory)
	for range 3 {
		before := answered.Load()
		proctest.AwaitThat(t, "requests are answered", func() bool { return answered.Load() > before+20 })
		proctest.Kill(t, current.PID, syscall.SIGHUP)
		next := s.Next()
		awaitCharge(t, directory, next)
		current.AwaitEnd()
		current = next
	}
	end()

	proctest.Terminate(t, current.PID)
	current.AwaitEnd()
	if left, err := os.ReadDir(directory); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestListenErrorLeavesNothingOpen(t *testing.T) {
	taken, err := net.Listen("tcp", "localhost:0")
	proctest.OK(t, err)
	defer taken.Close()
	upg, err := stub.New()
	proctest.OK(t, err)
	socket := filepath.Join(t.TempDir(), "socket")
	err = service.Run(upg, service.Options{},
		service.Background(func(context.Context) error { return nil }),
		service.HTTP(&http.Server{Addr: socket}), service.HTTP(&http.Server{Addr: taken.Addr().String()}))
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v, want that the address is in use", err)
	}
	if _, err := net.Dial("unix", socket); err == nil {
		t.Error("the first listener is still open")
	}
	<-upg.Exit()
}

func TestListenPacketError(t *testing.T) {
	taken, err := net.ListenPacket("udp", "localhost:0")
	proctest.OK(t, err)
	defer taken.Close()
	upg, err := stub.New()
	proctest.OK(t, err)
	err = service.Run(upg, service.Options{Logger: slog.New(slog.DiscardHandler)},
		service.Packet("udp", taken.LocalAddr().String(), answerPackets(nil, nil), nil))
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v, want that the address is in use", err)
	}
}

func init() { proctest.Role("afterwards", afterwardsRole) }

// afterwardsRole goes on after Run, and has the signals' own effect again.
func afterwardsRole() {
	wire := proctest.OpenWire()
	upg := proctest.Must(stub.New())
	background := service.Background(func(ctx context.Context) error {
		wire.Report("running")
		<-ctx.Done()
		return nil
	})
	proctest.Must(0, service.Run(upg, service.Options{Logger: slog.New(slog.DiscardHandler)}, background))
	wire.Report("returned")
	select {}
}

func TestSignalsAfterRun(t *testing.T) {
	s := proctest.NewService(t)
	s.Start(s.Command("afterwards", s.Wire()))
	p := s.Next()
	p.Await("running")
	proctest.Terminate(t, p.PID)
	p.Await("returned")
	proctest.Terminate(t, p.PID)
	p.AwaitEnd()
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
	proctest.OK(t, err)
	server := &http.Server{Addr: "localhost:0", ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	err = service.Run(brokenUpgrader{upg}, service.Options{Logger: slog.New(slog.DiscardHandler)}, service.HTTP(server))
	if !errors.Is(err, errBroken) {
		t.Errorf("got %v, want %v", err, errBroken)
	}
}

type unreadyUpgrader struct{ *stub.Upgrader }

func (unreadyUpgrader) Ready() error { return errBroken }

func TestReadyErrorStopsTheService(t *testing.T) {
	upg, err := stub.New()
	proctest.OK(t, err)
	err = service.Run(unreadyUpgrader{upg}, service.Options{Logger: slog.New(slog.DiscardHandler)}, service.HTTP(&http.Server{Addr: "localhost:0"}))
	if !errors.Is(err, errBroken) {
		t.Errorf("got %v, want %v", err, errBroken)
	}
}

// That the program has stopped the Upgrader is an error, unless a signal has told it to.
func TestStopBeforeReady(t *testing.T) {
	upg, err := stub.New()
	proctest.OK(t, err)
	upg.Stop()
	err = service.Run(upg, service.Options{Logger: slog.New(slog.DiscardHandler)})
	proctest.WantError(t, "Run", err, tableflip.ErrStopped)
}
