package load

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// Exchanges that go on until the client ends them: streams like those of a WebSocket, and
// downloads by clients that read slowly. For tests of what lives longer than a process is
// in charge.

const (
	streamPath   = "/held/stream"
	downloadPath = "/held/download"
	downloadSize = 1 << 20 // more than the buffers of a Unix socket hold
)

// ServeHeld is a handler for what Hold asks. It reports whether it was that.
func ServeHeld(w http.ResponseWriter, r *http.Request) bool {
	switch r.URL.Path {
	case streamPath:
		serveStream(w)
	case downloadPath:
		w.Header().Set("Content-Length", strconv.Itoa(downloadSize))
		begin := fmt.Appendln(nil, os.Getpid())
		_, _ = w.Write(append(begin, make([]byte, downloadSize-len(begin))...))
	default:
		return false
	}
	return true
}

// serveStream answers each line by the process ID.
func serveStream(w http.ResponseWriter) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer conn.Close()
	_, err = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: pid\r\n\r\n")
	for err == nil {
		if _, err = buffered.ReadString('\n'); err == nil {
			_, err = fmt.Fprintln(conn, os.Getpid())
		}
	}
}

// A Held is an exchange that has begun.
type Held struct {
	By int // the process that serves it

	conn   net.Conn
	reader *bufio.Reader // of what follows
	stream bool
}

// Hold begins n streams, and as many downloads, at a Unix socket.
func Hold(socket string, n int) ([]*Held, error) {
	var all []*Held
	for i := range 2 * n {
		h := &Held{stream: i%2 == 0}
		all = append(all, h)
		if err := h.begin(socket); err != nil {
			EndAll(all)
			return nil, fmt.Errorf("begin what is held: %w", err)
		}
	}
	return all, nil
}

// EndAll closes all connections.
func EndAll(all []*Held) {
	for _, h := range all {
		if h.conn != nil {
			h.conn.Close()
		}
	}
}

func (h *Held) begin(socket string) (err error) {
	if h.conn, err = net.Dial("unix", socket); err != nil {
		return err
	}
	h.conn.SetDeadline(time.Now().Add(Limit))
	path, header := downloadPath, ""
	if h.stream {
		path, header = streamPath, "Connection: Upgrade\r\nUpgrade: pid\r\n"
	}
	if _, err = fmt.Fprintf(h.conn, "GET %s HTTP/1.1\r\nHost: held\r\n%s\r\n", path, header); err != nil {
		return err
	}
	h.reader = bufio.NewReader(h.conn)
	response, err := http.ReadResponse(h.reader, nil)
	if err != nil {
		return err
	}
	if h.stream {
		h.By, err = h.ask()
		return err
	}
	h.reader = bufio.NewReader(response.Body)
	h.By, err = h.readPID()
	return err
}

// ask sends a line on a stream, and returns who has answered.
func (h *Held) ask() (pid int, err error) {
	if _, err := io.WriteString(h.conn, "who?\n"); err != nil {
		return 0, err
	}
	return h.readPID()
}

func (h *Held) readPID() (int, error) {
	line, err := h.reader.ReadString('\n')
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(line))
}

// Finish ends the exchange, and returns an error unless it is complete, and was finished
// by the process that has begun it.
func (h *Held) Finish() error {
	defer h.conn.Close()
	h.conn.SetDeadline(time.Now().Add(Limit))
	if h.stream {
		pid, err := h.ask()
		if err == nil && pid != h.By {
			err = fmt.Errorf("process %d has answered", pid)
		}
		return h.named(err)
	}
	rest, err := io.ReadAll(h.reader)
	switch left := downloadSize - len(fmt.Sprintln(h.By)) - len(rest); {
	case err != nil:
	case left != 0:
		err = fmt.Errorf("%d bytes are missing", left)
	case len(bytes.Trim(rest, "\x00")) > 0:
		err = errors.New("it has other content")
	}
	return h.named(err)
}

func (h *Held) named(err error) error {
	if err == nil {
		return nil
	}
	kind := "download"
	if h.stream {
		kind = "stream"
	}
	return fmt.Errorf("a %s that process %d has begun: %w", kind, h.By, err)
}
