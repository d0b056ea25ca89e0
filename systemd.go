package tableflip

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// This file owns the conversation with the service manager: what it is told
// (sd_notify(3)), the sockets that it gave to the first generation
// (sd_listen_fds(3)), and the copies that it keeps of the registry's sockets (the
// descriptor store of systemd.service(5)). That there is no manager is no special
// case: a nil manager, and a nil store, do nothing.

// Tests make these shorter.
var (
	// notifyTimeout bounds a message to a manager whose queue is full.
	notifyTimeout = time.Second

	// barrierTimeout is how long the manager may take to learn of a handover.
	barrierTimeout = 5 * time.Second
)

// maxStatus keeps a message below the 4,096 bytes that systemd reads of one.
const maxStatus = 1000

// A manager is what started the first generation, and wants to know which
// process is the main one.
type manager struct {
	addr   *net.UnixAddr
	logger *slog.Logger
}

func findManager(logger *slog.Logger) *manager {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	m := &manager{&net.UnixAddr{Net: "unixgram", Name: path}, logger}
	if path[0] != '/' && path[0] != '@' {
		m.log(fmt.Errorf("NOTIFY_SOCKET is %q, which is no Unix socket", path))
		return nil
	}
	return m
}

// notify tells the manager. It fails no upgrade: errors are logged.
func (m *manager) notify(fields ...string) {
	if m != nil {
		m.log(m.send(nil, fields...))
	}
}

func (m *manager) send(rights []byte, fields ...string) error {
	conn, err := m.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	return sendFields(conn, rights, fields...)
}

func (m *manager) dial() (*net.UnixConn, error) {
	return net.DialUnix("unixgram", nil, m.addr)
}

func sendFields(conn *net.UnixConn, rights []byte, fields ...string) error {
	if err := conn.SetWriteDeadline(time.Now().Add(notifyTimeout)); err != nil {
		return err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	// Not WriteMsgUnix, which wants a socket that is not connected, which can
	// write only if it is bound.
	writeErr := raw.Write(func(fd uintptr) bool {
		err = sendMessage(fd, []byte(strings.Join(fields, "\n")), rights)
		return !isBlocked(err)
	})
	return cmp.Or(writeErr, err)
}

func (m *manager) log(err error) {
	if err != nil && m.logger != nil {
		m.logger.Warn("tableflip: can't talk to the service manager", "error", err)
	}
}

// reloading says that an upgrade begins.
func (m *manager) reloading() {
	if m == nil {
		return
	}
	fields := []string{"RELOADING=1"}
	if monotonicClock != nil {
		// Type=notify-reload tells by it which SIGHUP is answered.
		if now, err := monotonicClock(); err == nil {
			fields = append(fields, fmt.Sprintf("MONOTONIC_USEC=%d", now.Microseconds()))
		}
	}
	m.notify(fields...)
}

// monotonicClock returns what CLOCK_MONOTONIC shows. It is nil except on Linux.
var monotonicClock func() (time.Duration, error)

// reloadFailed says that an upgrade has left this process in charge.
func (m *manager) reloadFailed(err error) {
	if m == nil {
		return
	}
	// systemd takes a carriage return, too, for the end of a field, and ignores a
	// message with a NUL in it, and a status that is not UTF-8.
	status := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, fmt.Sprintf("upgrade failed: %v", err))
	if len(status) > maxStatus {
		status = strings.ToValidUTF8(status[:maxStatus], "")
	}
	m.notify("READY=1", "STATUS="+status)
}

// A handOver has opened, before the commit, what it takes to tell the manager after
// it: one that was left with the old main process would end the service with that,
// for want of a descriptor.
type handOver struct {
	manager     *manager
	conn        *net.UnixConn // nil if the manager can't be reached
	read, write *os.File      // the barrier's pipe
}

// prepareHandOver returns an error only if there are no descriptors.
func (m *manager) prepareHandOver() (*handOver, error) {
	if m == nil {
		return nil, nil
	}
	h := &handOver{manager: m}
	var err error
	if h.conn, err = m.dial(); err != nil {
		m.log(err)
	}
	if h.read, h.write, err = os.Pipe(); err != nil {
		h.close()
		return nil, fmt.Errorf("tableflip: prepare to tell the service manager: %w%s", err, adviseLimit(err))
	}
	return h, nil
}

func (h *handOver) close() {
	if h == nil {
		return
	}
	if h.conn != nil {
		h.conn.Close()
	}
	h.read.Close()
	h.write.Close()
}

// tell says that pid is the main process from now on. It returns when the manager
// has read that, or takes too long: it must have while this process, to which it
// listens, is there. It reports whether the manager was told.
func (h *handOver) tell(pid int) bool {
	if h == nil || h.conn == nil {
		return false
	}
	err := sendFields(h.conn, nil, fmt.Sprintf("MAINPID=%d", pid), "READY=1", "STATUS=")
	told := err == nil
	if told {
		err = h.barrier()
	}
	if err != nil {
		h.manager.log(fmt.Errorf("tell it the new main process, %d: %w", pid, err))
	}
	return told
}

// barrier returns once the manager has read all messages before this one: it
// closes the descriptor that comes with it (sd_notify_barrier(3)).
func (h *handOver) barrier() error {
	err := control(h.write, func(fd uintptr) error { return sendFields(h.conn, socketRights(fd), "BARRIER=1") })
	h.write.Close()
	if err != nil {
		return err
	}
	if err := h.read.SetReadDeadline(time.Now().Add(barrierTimeout)); err != nil {
		return err
	}
	if _, err = h.read.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

// withoutWatchdogPID removes a variable that, naming this process, would tell a
// child that the watchdog (sd_watchdog_enabled(3)) is not for it.
func withoutWatchdogPID(env []string) []string {
	return slices.DeleteFunc(env, func(variable string) bool {
		return variable == "WATCHDOG_PID="+string(ownPID())
	})
}

// isChildOfSystemd reports whether systemd is the parent of this process. New
// processes are then started as its children, too: a main process that is none when
// MAINPID or the PID file names it ("Supervising process which is not our child")
// stays one to it that it does not wait for. It sends it SIGKILL right after SIGTERM
// when the unit is stopped, and does not notice if it dies.
func isChildOfSystemd() bool {
	if os.Getenv("INVOCATION_ID") == "" {
		return false
	}
	parent := os.Getppid()
	return parent == 1 || strconv.Itoa(parent) == os.Getenv("MANAGERPID") // systemd.exec(5)
}

// The variables of sd_listen_fds(3).
const (
	listenPID   = "LISTEN_PID"
	listenFDs   = "LISTEN_FDS"
	listenNames = "LISTEN_FDNAMES"
	listenPIDFD = "LISTEN_PIDFDID"

	firstActivated = 3
)

// systemdNetwork is the network by which a socket's name in LISTEN_FDNAMES, as
// its address, is claimed.
const systemdNetwork = "systemd"

// isActivated reports whether the variables are meant for this process, and not for
// an ancestor or, say, the shell script that has started it.
func isActivated() bool { return os.Getenv(listenPID) == string(ownPID()) }

// findActivated returns the descriptors that the manager has opened for this
// process.
func findActivated() ([]*descriptor, error) {
	if !isActivated() {
		return nil, nil
	}
	count, err := strconv.ParseUint(os.Getenv(listenFDs), 10, 31)
	if err != nil {
		return nil, fmt.Errorf("tableflip: %s must be the number of the descriptors that were passed: %w (to start without them, unset it and %s)", listenFDs, err, listenPID)
	}
	names := strings.Split(os.Getenv(listenNames), ":")
	var descriptors []*descriptor
	for i := range int(count) {
		fdName := "unknown" // as sd_listen_fds_with_names(3) has it
		if i < len(names) && names[i] != "" {
			fdName = names[i]
		}
		d, err := activated(firstActivated+uintptr(i), fdName)
		if err != nil {
			return nil, fmt.Errorf("tableflip: take over descriptor %d, %q, of the %d that %s announces: %w", firstActivated+i, fdName, count, listenFDs, err)
		}
		descriptors = append(descriptors, d)
	}
	return descriptors, nil
}

func activated(fd uintptr, fdName string) (*descriptor, error) {
	s, err := identifySocket(fd)
	if err != nil {
		return nil, err
	}
	d := &descriptor{fdName: fdName}
	var stored bool
	if d.name, stored = parseStoreName(fdName); stored && d.kind == s.kind {
		e := entry{descriptor: d}
		e.describe(s.addr())
	} else if s.kind == kindFile {
		d.name = name{kindFile, fdName, ""}
	} else {
		// The manager unlinks the socket file, so that this package does not
		// get to know its path.
		d.name = name{s.kind, systemdNetwork, fdName}
	}
	return d, nil
}

// forgetActivated keeps the variables from this process's children.
func forgetActivated() error {
	if !isActivated() {
		return nil
	}
	return errors.Join(os.Unsetenv(listenPID), os.Unsetenv(listenFDs), os.Unsetenv(listenNames), os.Unsetenv(listenPIDFD))
}

// A socket is what the kernel says about a descriptor.
type socket struct {
	kind    string // as in a name; kindFile if it is no socket that package net knows
	network string
	bound   netip.AddrPort // of TCP and UDP
	dual    bool           // IPv6 that takes IPv4, too
	path    string         // of Unix; an abstract one begins with @
}

func (s socket) addr() net.Addr {
	switch s.network {
	case "tcp":
		return net.TCPAddrFromAddrPort(s.bound)
	case "udp":
		return net.UDPAddrFromAddrPort(s.bound)
	default:
		return &net.UnixAddr{Net: s.network, Name: s.path}
	}
}

// An endpoint is what a caller asks for, understood.
type endpoint struct {
	network, family string // "tcp6" is "tcp" and "6"
	ip              netip.Addr
	anyIP, loopback bool
	port            uint16
	path            string
}

// parseEndpoint returns false for what names no particular socket. A host name is
// not resolved, other than "localhost".
func parseEndpoint(n name) (endpoint, bool) {
	switch n.network {
	case "unix", "unixgram", "unixpacket":
		path := n.addr
		if !strings.HasPrefix(path, "@") && !strings.HasPrefix(path, "/") {
			if dir, err := os.Getwd(); err == nil {
				path = dir + "/" + path
			}
		}
		return endpoint{network: n.network, path: path}, n.addr != ""
	case "tcp", "tcp4", "tcp6", "udp", "udp4", "udp6":
	default:
		return endpoint{}, false
	}
	host, service, err := net.SplitHostPort(n.addr)
	if err != nil {
		return endpoint{}, false
	}
	port, err := net.LookupPort(n.network, service)
	if err != nil {
		return endpoint{}, false
	}
	want := endpoint{network: n.network[:3], family: n.network[3:], port: uint16(port)}
	switch host {
	case "", "*":
		want.anyIP = true
	case "localhost":
		want.loopback = true
	default:
		if want.ip, err = netip.ParseAddr(host); err != nil {
			return endpoint{}, false
		}
		want.ip = want.ip.Unmap()
		want.anyIP = want.ip.IsUnspecified()
	}
	return want, true
}

// answers reports whether s serves who asks for want. If not exactly, any address
// that stands for all is as good as another, as a socket bound to one is in the
// way of a new one bound to the other.
func (s socket) answers(want endpoint, exactly bool) bool {
	if s.network != want.network {
		return false
	}
	if s.network != "tcp" && s.network != "udp" {
		return s.path == want.path
	}
	ip := s.bound.Addr().Unmap()
	if s.bound.Port() != want.port || want.family == "4" && ip.Is6() && !s.dual || want.family == "6" && ip.Is4() {
		return false
	}
	switch {
	case want.anyIP && exactly && want.ip.IsValid():
		return ip == want.ip
	case want.anyIP && exactly:
		return ip.IsUnspecified() && (ip.Is4() || s.dual)
	case want.anyIP:
		return ip.IsUnspecified()
	case want.loopback:
		return ip.IsLoopback()
	default:
		return ip == want.ip
	}
}

// findActivated returns the first entry that the manager has passed, nobody has
// claimed, and want asks for.
func (f *Fds) findActivated(n name, want endpoint) *entry {
	for _, exactly := range []bool{true, false} {
		for _, e := range f.entries {
			if e.used || e.fdName == "" || e.kind != n.kind {
				continue
			}
			var s socket
			err := e.control(func(fd uintptr) (err error) {
				s, err = identifySocket(fd)
				return err
			})
			if err == nil && s.answers(want, exactly) {
				return e
			}
		}
	}
	return nil
}

// rename makes n the name of e, by which the next child will ask for it.
func (f *Fds) rename(e *entry, n name) {
	d := *e.descriptor
	d.name = n
	e.descriptor = &d
	f.byName = nil
}

// A store holds the manager's copies of the registry's sockets. It is guarded by
// Fds.mu.
type store struct {
	manager *manager
	wanted  bool     // Options.DescriptorStore
	open    bool     // the manager listens to this process by now
	removed []string // what to remove once it does
	stuck   bool     // it does not read what it is sent: no more is
}

func (s *store) send(rights []byte, fields ...string) error {
	if s.stuck {
		return errors.New("it did not read what it was sent before")
	}
	err := s.manager.send(rights, fields...)
	s.stuck = errors.Is(err, os.ErrDeadlineExceeded)
	return err
}

// storePrefix begins the names of the sockets that this package has stored. What
// else the manager passes, it owns.
const storePrefix = "tableflip,"

// storeName returns the FDNAME for a socket: sd_notify(3) allows 255 printable
// ASCII characters that are no colons.
func storeName(n name) string {
	var text strings.Builder
	text.WriteString(storePrefix)
	writeEscaped(&text, n.kind)
	text.WriteByte(',')
	writeEscaped(&text, n.network)
	text.WriteByte(',')
	writeEscaped(&text, n.addr)
	return strings.ReplaceAll(text.String(), ":", "%3A")
}

// parseStoreName is the inverse of storeName.
func parseStoreName(fdName string) (name, bool) {
	fields := strings.Split(fdName, ",")
	if len(fields) != 4 || !isStored(fdName) {
		return name{}, false
	}
	for i, field := range fields {
		var err error
		if fields[i], err = url.PathUnescape(field); err != nil {
			return name{}, false
		}
	}
	return name{fields[1], fields[2], fields[3]}, true
}

func (s *store) remove(fdName string) {
	s.manager.log(s.send(nil, "FDSTOREREMOVE=1", "FDNAME="+fdName))
}

func isStored(fdName string) bool { return strings.HasPrefix(fdName, storePrefix) }

// openStore brings the manager's copies in line with the registry, and keeps them
// so from then on. It must not be called before the manager listens to this
// process.
func (f *Fds) openStore() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.openStoreLocked()
}

func (f *Fds) openStoreLocked() {
	s := f.store
	if s == nil || s.open || f.closed != nil {
		return
	}
	s.open = true
	if !s.wanted {
		for _, e := range f.entries {
			s.removed = append(s.removed, e.fdName)
		}
	}
	slices.Sort(s.removed)
	for _, fdName := range slices.Compact(s.removed) {
		f.unstore(fdName)
	}
	s.removed = nil
	for _, e := range f.entries {
		f.keep(e)
	}
}

// keep gives the manager a copy of e, if it is a socket that the next process
// could ask for and of which the manager has none.
func (f *Fds) keep(e *entry) {
	s := f.store
	if s == nil || !s.open || !s.wanted || e.fdName != "" || e.kind != kindListener && e.kind != kindPacketConn {
		return
	}
	fdName := storeName(e.name)
	err := error(nil)
	if len(fdName) > 255 {
		err = errors.New("its name is too long")
	} else {
		err = e.control(func(fd uintptr) error {
			// Left to itself, systemd drops a socket on which an error is pending.
			return s.send(socketRights(fd), "FDSTORE=1", "FDNAME="+fdName, "FDPOLL=0")
		})
	}
	if err != nil {
		s.manager.log(fmt.Errorf("store %q: %w", e.name, err))
		return
	}
	e.setFDName(fdName)
}

// unstore has the manager close its copies of this name, except of entries that
// still are in the registry.
func (f *Fds) unstore(fdName string) {
	s := f.store
	if s == nil || !isStored(fdName) {
		return
	}
	if !s.open {
		s.removed = append(s.removed, fdName)
		return
	}
	s.remove(fdName)
	for _, e := range f.entries {
		if e.fdName == fdName {
			e.setFDName("")
			f.keep(e)
		}
	}
}

// emptyStore has the manager close all copies, as nobody will ask for them.
func (f *Fds) emptyStore() {
	s := f.store
	if s == nil {
		return
	}
	for _, e := range f.entries {
		if isStored(e.fdName) {
			s.removed = append(s.removed, e.fdName)
		}
	}
	slices.Sort(s.removed)
	for _, fdName := range slices.Compact(s.removed) {
		s.remove(fdName)
	}
}

func (e *entry) setFDName(fdName string) {
	// A child that is being started may be reading the old one.
	d := *e.descriptor
	d.fdName = fdName
	e.descriptor = &d
}
