package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

const redrawInterval = 100 * time.Millisecond

// A progress tells what is going on: in one line that changes on a terminal, and
// in one line per event elsewhere.
type progress struct {
	out      io.Writer
	terminal bool
	ended    chan struct{}
	drawing  sync.WaitGroup

	mu    sync.Mutex
	text  string
	load  *load
	width int // of the line that is on the terminal
}

func newProgress(out io.Writer, terminal bool) *progress {
	p := &progress{out: out, terminal: terminal, ended: make(chan struct{})}
	if terminal {
		p.drawing.Go(p.redraw)
	}
	return p
}

func (p *progress) redraw() {
	tick := time.NewTicker(redrawInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.mu.Lock()
			p.draw()
			p.mu.Unlock()
		case <-p.ended:
			return
		}
	}
}

// say tells of an event.
func (p *progress) say(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.text = fmt.Sprintf(format, args...)
	p.draw()
}

// count adds the numbers of load to what is shown from now on.
func (p *progress) count(load *load) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.load = load
}

func (p *progress) draw() {
	line := p.text
	if p.load != nil {
		line += fmt.Sprintf("; %d requests, %d failed", p.load.served.Load(), p.load.failed.Load())
	}
	if !p.terminal {
		fmt.Fprintln(p.out, line)
		return
	}
	// A line that is wrapped could not be overwritten. Spaces work where
	// escape sequences do not.
	line = line[:min(len(line), 79)]
	fmt.Fprintf(p.out, "\r%s%s", line, strings.Repeat(" ", max(0, p.width-len(line))))
	p.width = len(line)
}

// end leaves the last line as it is. It may be called again.
func (p *progress) end() {
	select {
	case <-p.ended:
		return
	default:
	}
	close(p.ended)
	p.drawing.Wait()
	if p.terminal {
		p.draw()
		fmt.Fprintln(p.out)
	}
}

func isTerminal(file *os.File) bool {
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// stopOnError ends the demo when nobody reads its output any more, as in
// "demo | head".
type stopOnError struct {
	out  io.Writer
	stop context.CancelCauseFunc
}

func (s stopOnError) Write(text []byte) (int, error) {
	n, err := s.out.Write(text)
	if err != nil {
		s.stop(err)
	}
	return n, err
}
