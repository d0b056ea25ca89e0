//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	clients "example.com/tableflip/internal/load"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/service"
	"example.com/tableflip/supervise"
)

func init() {
	proctest.Role("serve", serveRole)
	proctest.Role("serve-self", func() {
		proctest.Must(0, supervise.Self())
		serveRole()
	})
}

// maxDrainingVariable is for Options.MaxDraining of real servers.
const maxDrainingVariable = "SUPERVISETEST_MAXDRAINING"

// serveRole is a real server on a socket in a directory. As long as the file hold
// is there, no process becomes ready.
func serveRole() {
	dir := proctest.Arg()
	go obey(proctest.OpenWire())
	maxDraining, _ := strconv.Atoi(os.Getenv(maxDrainingVariable))
	upg := proctest.Must(tableflip.New(tableflip.Options{PIDFile: filepath.Join(dir, "pid"), MaxDraining: maxDraining}))
	for proctest.Exists(filepath.Join(dir, "hold")) {
		time.Sleep(5 * time.Millisecond) // a poll
	}
	opts := service.Options{IdleGrace: proctest.Patience, WaitHijacked: true, DrainTimeout: time.Hour}
	err := service.Run(upg, opts, service.HTTP(&http.Server{
		Addr: filepath.Join(dir, "socket"),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if clients.ServeHeld(w, r) {
				return
			}
			body, err := io.ReadAll(r.Body)
			if err == nil {
				fmt.Fprintf(w, "%d %s", os.Getpid(), body)
			}
		}),
	}))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// mainPID is the process in charge, as its PID namespace sees it.
func mainPID(dir string) int {
	content, _ := os.ReadFile(filepath.Join(dir, "pid"))
	pid, _ := strconv.Atoi(string(content))
	return pid
}

// load sends requests until it is stopped, and fails the test if one is lost.
type load struct {
	answered atomic.Int64
	stop     func()
}

// transportTo returns a client's side of the service in dir.
func transportTo(dir string) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "socket"))
		},
	}
}

func startLoad(t *testing.T, dir string) *load {
	l := &load{}
	ctx, cancel := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	for i := range 2 {
		transport := transportTo(dir)
		transport.DisableKeepAlives = i == 0
		client := &http.Client{Transport: transport}
		clients.Go(func() {
			defer transport.CloseIdleConnections()
			for n := 0; ctx.Err() == nil; n++ {
				if err := post(client, fmt.Sprint("request ", n)); err != nil {
					t.Errorf("keep-alive %t: %v", i > 0, err)
					return
				}
				l.answered.Add(1)
			}
		})
	}
	l.stop = sync.OnceFunc(func() {
		cancel()
		clients.Wait()
	})
	t.Cleanup(l.stop)
	return l
}

// post sends a body that cannot be sent twice, so that no client repeats it.
func post(client *http.Client, body string) error {
	answer, err := client.Post("http://service/", "text/plain", io.NopCloser(strings.NewReader(body)))
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	content, err := io.ReadAll(answer.Body)
	if err == nil && !strings.HasSuffix(string(content), " "+body) {
		err = fmt.Errorf("answered %q", content)
	}
	return err
}

// upgradeUnderLoad has the service be upgraded by SIGHUP to its supervisor, and
// returns the last generation.
func (b *bed) upgradeUnderLoad(upgrades int, hangUp func()) *puppet {
	b.t.Helper()
	current := b.next()
	proctest.AwaitThat(b.t, "the service is ready", func() bool { return mainPID(b.dir) == current.PID })
	l := startLoad(b.t, b.dir)
	for range upgrades {
		before := l.answered.Load()
		proctest.AwaitThat(b.t, "requests are answered", func() bool { return l.answered.Load() > before+10 })
		hangUp()
		child := b.next()
		proctest.AwaitThat(b.t, "the next generation is in charge", func() bool { return mainPID(b.dir) == child.PID })
		current.AwaitEnd() // until then, it refuses to be upgraded
		current = child
	}
	l.stop()
	return current
}

func TestUpgradesUnderLoad(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.start(supervisor(nil, "serve"))
	b.upgradeUnderLoad(3, func() { b.signal(syscall.SIGHUP) })
	b.signal(syscall.SIGTERM)
	b.wantStatus(0)
}

func TestTermWhileUpgrading(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.start(supervisor(nil, "serve"))
	b.isStoppedWhileUpgrading()
}

// isUpgrading returns when the child that is to replace the first generation has
// been started. It does not become ready before the file hold is removed.
func (b *bed) isUpgrading() (first, child *puppet) {
	b.t.Helper()
	first = b.next()
	proctest.AwaitThat(b.t, "the service is ready", func() bool { return mainPID(b.dir) == first.PID })
	proctest.OK(b.t, os.WriteFile(filepath.Join(b.dir, "hold"), nil, 0o644))
	b.signal(syscall.SIGHUP)
	return first, b.next()
}

func (b *bed) isStoppedWhileUpgrading() {
	b.t.Helper()
	_, child := b.isUpgrading()
	b.signal(syscall.SIGTERM)
	child.AwaitEnd()
	b.wantStatus(0)
}

func TestStopWhileDraining(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.start(supervisor(nil, "serve"))
	b.isStoppedWhileDraining()
}

// isStoppedWhileDraining stops the service while an older generation has a request that
// takes longer than it would have if its successor had crashed.
func (b *bed) isStoppedWhileDraining() {
	b.t.Helper()
	first := b.next()
	proctest.AwaitThat(b.t, "the service is ready", func() bool { return mainPID(b.dir) == first.PID })
	transport := transportTo(b.dir)
	transport.DisableKeepAlives = true
	transport.ExpectContinueTimeout = proctest.Patience // what is written has been asked for by the service
	body, write := io.Pipe()
	request, err := http.NewRequest(http.MethodPost, "http://service/", body)
	proctest.OK(b.t, err)
	request.Header.Set("Expect", "100-continue")
	answers := make(chan string, 1)
	go func() {
		answer, err := transport.RoundTrip(request)
		if err != nil {
			body.CloseWithError(err)
			answers <- err.Error()
			return
		}
		defer answer.Body.Close()
		content, err := io.ReadAll(answer.Body)
		answers <- fmt.Sprint(string(content), " ", err)
	}()
	io.WriteString(write, "hel")

	b.signal(syscall.SIGHUP)
	child := b.next()
	proctest.AwaitThat(b.t, "the next generation is in charge", func() bool { return mainPID(b.dir) == child.PID })
	b.signal(syscall.SIGTERM)
	child.AwaitEnd()
	time.Sleep(1500 * time.Millisecond) // service would have cut it after a second
	io.WriteString(write, "lo")
	write.Close()
	if got, want := <-answers, fmt.Sprint(first.PID, " hello <nil>"); got != want {
		b.t.Errorf("got the answer %q, want %q", got, want)
	}
	first.AwaitEnd()
	b.wantStatus(0)
}

func TestSelf(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	cmd := command(proctest.Arguments("serve-self"))
	if runtime.GOOS == "linux" {
		// A supervisor that is not an ancestor supervises another service.
		cmd.Env = append(os.Environ(), "TABLEFLIP_SUPERVISOR="+strconv.Itoa(startSleeper(b)))
	}
	b.start(cmd)
	last := b.upgradeUnderLoad(2, func() { b.signal(syscall.SIGHUP) })
	if got := last.do("environment", "TABLEFLIP_SUPERVISOR"); got != strconv.Itoa(b.pid) {
		t.Errorf("supervisor %s, want %d", got, b.pid)
	}
	b.signal(syscall.SIGTERM)
	b.wantStatus(0)
}

func startSleeper(b *bed) int {
	cmd := exec.Command("sleep", "1000")
	b.service.Start(cmd)
	return cmd.Process.Pid
}

// A program that is not found by its name finds itself.
func TestSelfUnderAnotherName(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	cmd := command(proctest.Arguments("self"))
	cmd.Args[0] = "no-such-program"
	b.start(cmd)
	first := b.next()
	first.Order("exit", "7")
	b.wantStatus(7)
}

// The supervisor and the first generation are started from a binary that is then
// replaced, as a deployment does.
func TestBinaryIsReplaced(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	binary := filepath.Join(b.dir, "binary")
	install := func() {
		// Not by this process: a copy of the descriptor, in what another test is just
		// starting, would make the file "busy" (golang/go#22315).
		err := exec.Command("cp", os.Args[0], binary+".new").Run()
		if err == nil {
			err = os.Rename(binary+".new", binary)
		}
		proctest.OK(t, err)
	}
	install()
	b.start(exec.Command(binary, proctest.Arguments("serve-self")[1:]...))
	b.upgradeUnderLoad(1, func() {
		install()
		b.signal(syscall.SIGHUP)
	})
	b.signal(syscall.SIGTERM)
	b.wantStatus(0)
}
