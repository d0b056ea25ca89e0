// Package deploy_test runs the recipes.
package deploy_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait for an event. No test passes because of it.
const patience = 30 * time.Second

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(10 * time.Millisecond) { // a poll
		if time.Now().After(end) {
			t.Fatalf("waited too long until %s", what)
		}
	}
}

// A process ends with the test.
type process struct {
	*exec.Cmd
	output bytes.Buffer
}

func start(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{Cmd: cmd}
	p.Stdout, p.Stderr = &p.output, &p.output
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p.ProcessState == nil {
			p.Process.Kill()
			p.Wait()
		}
		if t.Failed() {
			t.Logf("%v:\n%s", p.Cmd, &p.output)
		}
	})
	return p
}

// A farm is two instances of web behind HAProxy.
type farm struct {
	t         *testing.T
	web       string
	flags     []string
	stats     string
	public    string
	addresses map[string]string
	instances map[string]*process
}

func startFarm(t *testing.T, flags ...string) *farm {
	t.Helper()
	haproxy, err := exec.LookPath("haproxy")
	if err != nil {
		t.Skip("needs haproxy, of Debian's package of that name")
	}
	dir := t.TempDir()
	// An address that no other test has, so that the ports are free.
	host := fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(250), rand.IntN(250), 1+rand.IntN(250))
	f := &farm{
		t:         t,
		web:       filepath.Join(dir, "web"),
		flags:     flags,
		stats:     filepath.Join(dir, "stats"),
		public:    host + ":8080",
		addresses: map[string]string{"a": host + ":8081", "b": host + ":8082"},
		instances: map[string]*process{},
	}
	if output, err := exec.Command("go", "build", "-o", f.web, "./web").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	cmd := exec.Command(haproxy, "-db", "-f", "haproxy.cfg")
	cmd.Env = append(os.Environ(), "STATS="+f.stats, "PUBLIC="+f.public, "WEB_A="+f.addresses["a"], "WEB_B="+f.addresses["b"])
	start(t, cmd)
	for name := range f.addresses {
		f.start(name)
	}
	return f
}

// start returns when HAProxy uses the instance.
func (f *farm) start(name string) {
	f.t.Helper()
	f.instances[name] = start(f.t, exec.Command(f.web, append([]string{"-listen", f.addresses[name]}, f.flags...)...))
	until(f.t, name+" is up", func() bool { return f.status(name) == "UP" })
}

func (f *farm) status(name string) string {
	conn, err := net.Dial("unix", f.stats)
	if err != nil {
		return ""
	}
	defer conn.Close()
	io.WriteString(conn, "show stat\n")
	table, _ := io.ReadAll(conn)
	for line := range strings.Lines(string(table)) {
		// pxname,svname, and status is the 18th.
		if fields := strings.Split(line, ","); len(fields) > 17 && fields[0] == "web" && fields[1] == name {
			return fields[17]
		}
	}
	return ""
}

func (f *farm) restart(name string) {
	f.t.Helper()
	p := f.instances[name]
	p.Process.Signal(syscall.SIGTERM)
	if err := p.Wait(); err != nil {
		f.t.Errorf("%s: %v", name, err)
	}
	f.start(name)
}

// restartUnderLoad restarts all instances twice, one after the other.
func (f *farm) restartUnderLoad() (sent, failed int64) {
	f.t.Helper()
	var stop atomic.Bool
	var total, refused atomic.Int64
	var clients sync.WaitGroup
	for i := range 8 {
		method, keep := []string{http.MethodGet, http.MethodPost}[i%2], i%4 < 2
		client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: !keep}}
		clients.Go(func() {
			defer client.CloseIdleConnections()
			for ; !stop.Load(); time.Sleep(5 * time.Millisecond) { // the pace
				total.Add(1)
				if err := exchange(client, method, "http://"+f.public+"/"); err != nil {
					if refused.Add(1) == 1 {
						f.t.Logf("the first failure: %v", err)
					}
				}
			}
		})
	}
	for range 2 {
		f.restart("a")
		f.restart("b")
	}
	stop.Store(true)
	clients.Wait()
	return total.Load(), refused.Load()
}

// exchange sends a body that cannot be sent twice, so that nobody repeats it.
func exchange(client *http.Client, method, url string) error {
	request, err := http.NewRequest(method, url, io.MultiReader(strings.NewReader("hello")))
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if answer, err := io.ReadAll(response.Body); err != nil || string(answer) != "hello" {
		return errors.Join(fmt.Errorf("%s %q", response.Status, answer), err)
	}
	return nil
}

// Without the delay, some requests fail, which depends on the machine's speed. With the
// delay that haproxy.cfg needs at least, some may on a machine that is busy.
func TestHAProxyWithDelay(t *testing.T) {
	sent, failed := startFarm(t, "-delay", "4s", "-grace", "200ms").restartUnderLoad()
	t.Logf("%d of %d requests failed", failed, sent)
	if failed > 0 {
		t.Error("requests failed")
	}
}
