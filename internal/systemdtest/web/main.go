//go:build unix

// Command web is the service that the tests run under systemd: HTTP over TCP and a
// Unix socket, and an echo over UDP. Every answer begins with the version and the
// process ID.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/control"
	"example.com/tableflip/internal/load"
	"example.com/tableflip/service"
)

// version is "version-NUMBER-BEHAVIOUR". The behaviour is what this version does
// when it takes over from another: "good", "fail" or "hang" before it is ready, "bind" an
// address that is in use or serve with a "cert" that is none, "tell" the service manager
// that it is the main process and then hang, "quit" as soon as it serves, or "exit" when it
// has answered on trial, or be "sick" then. The tests write over it in the binary, so that it
// must be set by -ldflags -X.
var version = "version-000000-good"

// upgradeTimeout is short, because the tests have to wait for it, and long enough for all that
// a busy machine has to do meanwhile.
const upgradeTimeout = 10 * time.Second

const controlSocket = "/run/web.ctl"

func main() {
	pidFile := flag.String("pid-file", "", "`file` for the process ID")
	store := flag.Bool("store", false, "keep the sockets in systemd's descriptor store")
	forget := flag.Bool("forget", false, "clear the environment at the start")
	maxDraining := flag.Int("max-draining", 0, "how many earlier processes may drain when an upgrade begins")
	patient := flag.Bool("patient", false, "drain as long as it takes, although the new process has died")
	ctl := flag.String("ctl", "", "ask the service that runs, as tableflip-ctl does")
	flag.Parse()
	if *ctl != "" {
		os.Exit(control.Main("-s", controlSocket, *ctl))
	}
	log.SetFlags(0)
	pingWatchdog()
	manager := os.Getenv("NOTIFY_SOCKET")
	if *forget {
		os.Clearenv()
	}

	trial, _ := time.ParseDuration(os.Getenv("TRIAL"))
	upg, err := tableflip.New(tableflip.Options{
		Trial:           trial,
		PIDFile:         *pidFile,
		UpgradeTimeout:  upgradeTimeout,
		DescriptorStore: *store,
		MaxDraining:     *maxDraining,
		Command:         wrap,
		Logger:          slog.Default(),
	})
	if err != nil {
		log.Fatal(err)
	}
	behaviour := "good"
	if upg.HasParent() {
		behaviour = version[strings.LastIndexByte(version, '-')+1:]
	}
	switch behaviour {
	case "fail":
		log.Fatal("this version fails")
	case "hang":
		select {}
	case "tell":
		notifier, err := dialManager(manager)
		if err == nil {
			_, err = fmt.Fprintf(notifier, "MAINPID=%d\nREADY=1", os.Getpid())
		}
		if err != nil {
			log.Fatal(err)
		}
		select {}
	}

	datagrams, err := listenPacket(upg)
	if err != nil {
		log.Fatal(err)
	}
	echoed := make(chan error, 1)
	ready := func() {
		if behaviour == "quit" {
			log.Fatal("this version quits")
		}
		go func() { echoed <- echo(upg, datagrams) }()
	}
	servers := []service.Server{
		service.HTTP(&http.Server{Addr: ":8080", Handler: answer(upg)}),
		service.HTTP(&http.Server{Addr: "/run/web.sock", Handler: answer(upg)}),
	}
	switch behaviour {
	case "bind":
		taken, err := net.Listen("tcp", "localhost:0")
		if err != nil {
			log.Fatal(err)
		}
		servers = append(servers, service.HTTP(&http.Server{Addr: taken.Addr().String()}))
	case "cert":
		servers = append(servers, service.HTTP(&http.Server{Addr: ":0", TLSConfig: &tls.Config{Certificates: []tls.Certificate{{}}}}))
	}
	options := service.Options{WaitHijacked: true, Control: controlSocket}
	if *maxDraining > 0 {
		options.DrainTimeout = 5 * time.Minute // more than any number of upgrades takes
	}
	if behaviour == "sick" || behaviour == "exit" {
		options.Healthy = func(ctx context.Context) error {
			select {
			case <-hasAnswered:
			case <-ctx.Done():
				return nil
			}
			if behaviour == "exit" {
				os.Exit(0)
			}
			return errors.New("this version is sick")
		}
	}
	err = service.Run(&readyUpgrader{upg, ready, *patient}, options, servers...)
	if err == nil {
		err = <-echoed
	}
	if err != nil {
		log.Fatal(err)
	}
}

// pingWatchdog pings the watchdog if the service manager expects that of this process
// (sd_watchdog_enabled(3)). It uses the variables that it finds at the start.
func pingWatchdog() {
	pid := os.Getenv("WATCHDOG_PID")
	if os.Getenv("WATCHDOG_USEC") == "" || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return
	}
	notifier, err := dialManager(os.Getenv("NOTIFY_SOCKET"))
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		for range time.Tick(50 * time.Millisecond) {
			if _, err := io.WriteString(notifier, "WATCHDOG=1"); err != nil {
				log.Fatal(err)
			}
		}
	}()
}

func dialManager(socket string) (net.Conn, error) { return net.Dial("unixgram", socket) }

// wrap has the next version started by the script in the variable WRAPPER, if it is
// set, which gets the command as its arguments.
func wrap(command *exec.Cmd) {
	if script := os.Getenv("WRAPPER"); script != "" {
		command.Args = append([]string{"sh", "-c", script, "wrapper", command.Path}, command.Args[1:]...)
		command.Path = "/bin/sh"
	}
}

// listenPacket asks for the socket by the name that a socket unit gives it.
func listenPacket(upg *tableflip.Upgrader) (net.PacketConn, error) {
	conn, err := upg.PacketConn("systemd", "web")
	if err != nil || conn != nil {
		return conn, err
	}
	return upg.ListenPacket("udp", ":8053")
}

// A readyUpgrader calls ready once the process is in charge.
type readyUpgrader struct {
	*tableflip.Upgrader
	ready   func()
	patient bool
}

func (u *readyUpgrader) Hurry() <-chan struct{} {
	if u.patient {
		return nil
	}
	return u.Upgrader.Hurry()
}

func (u *readyUpgrader) Ready() error {
	err := u.Upgrader.Ready()
	if err == nil {
		u.ready()
	}
	return err
}

var (
	hasAnswered = make(chan struct{})
	answered    = sync.OnceFunc(func() { close(hasAnswered) })
)

// answer returns the request's body: at once, once the process is to exit if the
// query is "hold=drain", or never if it is "hold=forever".
func answer(upg *tableflip.Upgrader) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if load.ServeHeld(w, r) {
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // the client is gone
		}
		if hold := r.URL.Query().Get("hold"); hold != "" {
			// Tell the client that its request has arrived.
			if err := http.NewResponseController(w).Flush(); err != nil {
				return
			}
			exit := upg.Exit()
			if hold == "forever" {
				exit = nil
			}
			select {
			case <-exit:
			case <-r.Context().Done():
				return
			}
		}
		fmt.Fprintf(w, "%s %d %s", version, os.Getpid(), body)
		answered()
	}
}

// echo answers datagrams until the process is to exit.
func echo(upg *tableflip.Upgrader, conn net.PacketConn) error {
	defer conn.Close()
	go func() {
		<-upg.Exit()
		conn.SetReadDeadline(time.Unix(1, 0))
	}()
	datagram := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(datagram)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := conn.WriteTo(fmt.Appendf(nil, "%s %d %s", version, os.Getpid(), datagram[:n]), from); err != nil {
			return err
		}
	}
}
