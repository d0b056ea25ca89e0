//go:build linux

package main

import (
	"context"
	"crypto/x509"
	"debug/buildinfo"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"text/template"
	"time"

	"example.com/tableflip/benchmarks/launch"
	"example.com/tableflip/internal/load"
)

// A peer is a way to replace a server by another.
type peer struct {
	name  string // as in -peers
	title string // as in the report
	lacks string // the kind of client that it has no answer for

	daemon    bool // nginx: the process that is started ends when the service runs
	inProcess bool // Caddy: what is replaced is the configuration, whose number it answers with

	// command returns what starts the server in s.dir.
	command func(s *server) *exec.Cmd
	// upgrade replaces the process that answers at present, or begins to.
	upgrade func(ctx context.Context, s *server, serving int) error
	// version fails if the peer is not installed.
	version func(built string) (string, error)
}

const (
	ours      = "ours"
	tableflip = "tableflip"
)

var peers = []*peer{
	goPeer(ours, "this library, httpdrain", "example.com/tableflip", signalServing(syscall.SIGHUP)),
	goPeer("ours-shutdown", "this library, Shutdown", "example.com/tableflip", signalServing(syscall.SIGHUP)),
	goPeer(tableflip, "tableflip, Shutdown", "github.com/cloudflare/tableflip", signalServing(syscall.SIGHUP)),
	goPeer("tableflip-httpdrain", "tableflip, our httpdrain", "github.com/cloudflare/tableflip", signalServing(syscall.SIGHUP)),
	goPeer("overseer", "overseer", "github.com/jpillora/overseer", signalFirst(syscall.SIGUSR2)),
	goPeer("endless", "endless", "github.com/fvbock/endless", signalServing(syscall.SIGHUP)),
	goPeer("grace", "grace", "github.com/facebookgo/grace", signalServing(syscall.SIGUSR2)),
	{name: "nginx", title: "nginx, reload", daemon: true, command: nginx, version: firstLine("nginx", "-v"), upgrade: reloadNginx},
	{name: "nginx-binary", title: "nginx, new binary", daemon: true, command: nginx, version: firstLine("nginx", "-v"), upgrade: replaceNginx},
	{name: "haproxy", title: "HAProxy, reload", command: haproxy, version: firstLine("haproxy", "-v"), upgrade: signalFirst(syscall.SIGUSR2)},
	{name: "caddy", title: "Caddy, reload", inProcess: true, command: caddy, version: caddyVersion, upgrade: reloadCaddy},
	goPeer("restart", "net/http, stop and start", "std", stopAndStart),
}

func peerOf(name string) *peer {
	for _, p := range peers {
		if p.name == name {
			return p
		}
	}
	return nil
}

// goPeer is the server in servers/NAME.
func goPeer(name, title, module string, upgrade func(context.Context, *server, int) error) *peer {
	p := &peer{name: name, title: title, upgrade: upgrade}
	if name == "endless" {
		p.lacks = http2 // its TLS listener does not offer it
	}
	p.command = func(s *server) *exec.Cmd {
		return exec.Command(filepath.Join(s.built, name), "-plain", s.plain, "-tls", s.tls,
			"-cert", filepath.Join(s.dir, load.CertFile), "-key", filepath.Join(s.dir, load.KeyFile), "-grace", s.grace.String())
	}
	p.version = func(built string) (string, error) {
		info, err := buildinfo.ReadFile(filepath.Join(built, name))
		if err != nil {
			return "", err
		}
		for _, dep := range info.Deps {
			if dep.Path == module && dep.Replace == nil {
				return dep.Path + " " + dep.Version, nil
			}
		}
		return info.GoVersion, nil
	}
	return p
}

// signalServing sends a signal to the process that answers.
func signalServing(sig syscall.Signal) func(context.Context, *server, int) error {
	return func(_ context.Context, _ *server, serving int) error { return syscall.Kill(serving, sig) }
}

// signalFirst sends a signal to the process that was started: a master process.
func signalFirst(sig syscall.Signal) func(context.Context, *server, int) error {
	return func(_ context.Context, s *server, _ int) error { return s.first.Process.Signal(sig) }
}

func stopAndStart(ctx context.Context, s *server, _ int) error {
	if err := s.first.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	<-s.ended
	return s.launch()
}

var (
	//go:embed servers/nginx/nginx.conf
	nginxConfig string
	//go:embed servers/haproxy/haproxy.cfg
	haproxyConfig string
	//go:embed servers/caddy/caddy.json
	caddyConfig string
)

// nginx ends when its master process runs. That one is a daemon, because only a
// daemon obeys USR2.
func nginx(s *server) *exec.Cmd {
	cmd := exec.Command("nginx", "-c", s.configure("nginx.conf", nginxConfig), "-e", filepath.Join(s.dir, "nginx.log"))
	cmd.Args[0] = cmd.Path // what it executes on USR2
	return cmd
}

func nginxMaster(s *server) (int, error) {
	content, err := os.ReadFile(filepath.Join(s.dir, "nginx.pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(content)))
}

func reloadNginx(_ context.Context, s *server, _ int) error {
	master, err := nginxMaster(s)
	if err != nil {
		return err
	}
	return syscall.Kill(master, syscall.SIGHUP)
}

func haproxy(s *server) *exec.Cmd {
	return exec.Command("haproxy", "-W", "-f", s.configure("haproxy.cfg", haproxyConfig))
}

// firstConfiguration is above the IDs of all processes (proc_sys_kernel(5), pid_max).
const firstConfiguration = 1 << 23

func caddy(s *server) *exec.Cmd {
	s.configuration = firstConfiguration
	cmd := exec.Command("caddy", "run", "--config", s.configure("caddy.json", caddyConfig))
	// It keeps its last configuration in its home directory.
	cmd.Env = append(os.Environ(), "HOME="+s.dir, "XDG_CONFIG_HOME="+s.dir, "XDG_DATA_HOME="+s.dir)
	return cmd
}

// caddyVersion prefers what the go command has recorded, because one that go install has
// built does not know its version.
func caddyVersion(string) (string, error) {
	path, err := exec.LookPath("caddy")
	if err != nil {
		return "", err
	}
	if info, err := buildinfo.ReadFile(path); err == nil && versionNumber.MatchString(info.Main.Version) {
		return "caddy " + info.Main.Version, nil
	}
	return firstLine(path, "version")("")
}

// reloadCaddy does what the command caddy reload does, without the time to start that.
func reloadCaddy(ctx context.Context, s *server, _ int) error {
	s.configuration++
	config, err := os.Open(s.configure("caddy.json", caddyConfig))
	if err != nil {
		return err
	}
	defer config.Close()
	admin := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(s.dir, "admin.sock"))
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://127.0.0.1/load", config)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := admin.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		answer, _ := io.ReadAll(resp.Body)
		return fmt.Errorf("caddy answers %s: %s", resp.Status, answer)
	}
	return nil
}

// replaceNginx follows "Upgrading Executable on the Fly" in nginx's documentation:
// USR2 starts the new master process, QUIT ends the old one.
func replaceNginx(ctx context.Context, s *server, _ int) error {
	old, err := nginxMaster(s)
	if err != nil {
		return err
	}
	if err := syscall.Kill(old, syscall.SIGUSR2); err != nil {
		return err
	}
	err = retry(ctx, func() error {
		if master, err := nginxMaster(s); err != nil || master == old {
			return errors.New("no new nginx wrote its PID file")
		}
		return nil
	})
	if err != nil {
		return err
	}
	return syscall.Kill(old, syscall.SIGQUIT)
}

var versionNumber = regexp.MustCompile(`\d+\.\d+\S*`)

func firstLine(program, flag string) func(string) (string, error) {
	return func(string) (string, error) {
		output, err := exec.Command(program, flag).CombinedOutput()
		if err != nil {
			return "", err
		}
		return program + " " + versionNumber.FindString(string(output)), nil
	}
}

// A server is a running peer. All of its processes are in one process group.
type server struct {
	*peer
	built      string // the directory of the Go servers' binaries
	dir        string // its own
	plain, tls string // addresses
	roots      *x509.CertPool
	grace      time.Duration
	startup    time.Duration // from its start to when it listened

	configuration int // of Caddy

	first *exec.Cmd
	ended <-chan struct{} // closed when first has ended
	group int             // its process group
}

func (p *peer) start(ctx context.Context, built string, grace time.Duration) (*server, error) {
	dir, err := os.MkdirTemp("", "benchmark")
	if err != nil {
		return nil, err
	}
	s := &server{peer: p, built: built, dir: dir, grace: grace}
	if err := s.open(ctx); err != nil {
		s.stop()
		return nil, fmt.Errorf("%s: %w", p.name, err)
	}
	return s, nil
}

func (s *server) open(ctx context.Context) error {
	// nginx's workers may run as another user.
	if err := os.Chmod(s.dir, 0o755); err != nil {
		return err
	}
	addrs, err := load.FreeAddresses(2)
	if err != nil {
		return err
	}
	s.plain, s.tls = addrs[0], addrs[1]
	if s.roots, err = load.WriteCertificate(s.dir); err != nil {
		return err
	}
	begin := time.Now()
	if err := s.launch(); err != nil {
		return err
	}
	if err := s.await(ctx); err != nil {
		return err
	}
	s.startup = time.Since(begin)
	return nil
}

func (s *server) launch() error {
	cmd := s.command(s)
	ended, err := launch.Start(cmd, s.dir)
	if err != nil {
		return err
	}
	s.first, s.ended, s.group = cmd, ended, cmd.Process.Pid
	return nil
}

// await returns when both addresses are listened on, and a daemon has told its PID.
func (s *server) await(ctx context.Context) error {
	for _, addr := range []string{s.plain, s.tls} {
		err := retry(ctx, func() error {
			conn, err := net.Dial("tcp", addr)
			if err == nil {
				conn.Close()
			}
			return err
		})
		if err != nil {
			log, _ := os.ReadFile(filepath.Join(s.dir, "log"))
			return fmt.Errorf("does not serve: %w; its log: %s", err, log)
		}
	}
	if !s.daemon {
		return nil
	}
	return retry(ctx, func() (err error) {
		s.group, err = nginxMaster(s)
		return err
	})
}

// retry tries something until it succeeds, or ten seconds have passed.
func retry(ctx context.Context, try func() error) error {
	for deadline := time.Now().Add(10 * time.Second); ; {
		err := try()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) || !load.Sleep(ctx, 100*time.Microsecond) {
			return err
		}
	}
}

// stop kills what is left of the server: the process group that it began.
func (s *server) stop() {
	if s.first != nil {
		syscall.Kill(-s.group, syscall.SIGKILL)
		<-s.ended
	}
	os.RemoveAll(s.dir)
}

// configure writes a configuration file from its template.
func (s *server) configure(name, content string) string {
	path := filepath.Join(s.dir, name)
	file, err := os.Create(path)
	if err != nil {
		panic(err)
	}
	defer file.Close()
	values := struct {
		Dir, Plain, TLS string
		Number          int
	}{s.dir, s.plain, s.tls, s.configuration}
	if err := template.Must(template.New(name).Parse(content)).Execute(file, values); err != nil {
		panic(err)
	}
	return path
}

// buildServers compiles the servers into dir.
func buildServers(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", dir+"/", "./servers/...")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("building the servers (run this in the folder benchmarks): %w", err)
	}
	return nil
}
