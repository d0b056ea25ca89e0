package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"example.com/tableflip/internal/event"
)

// This file owns how a client follows the events of a service from one generation to
// the next. Each process streams its own, and a process that was replaced goes on until
// it has drained. So two streams, or more, are read side by side.

// progressTimeout is how long an upgrade waits for its progress to be seen. It is a
// variable for tests.
var progressTimeout = time.Second

// maxLine is more than a step is long.
const maxLine = 1 << 20

// A followed is what a stream has brought: a step, or its end.
type followed struct {
	step
	from  string // the PID of the process
	ended bool
	err   error // why, or nil if the process has ended the stream
}

// follow calls show for each event, until ctx ends, or nobody serves any more.
func (c *client) follow(ctx context.Context, show func(step)) error {
	all := make(chan followed)
	streams := 0
	start := func(avoid string) {
		streams++
		go c.stream(ctx, avoid, func(f followed) {
			select {
			case all <- f:
			case <-ctx.Done():
			}
		})
	}
	start("")
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case f := <-all:
			if !f.ended {
				show(f.step)
				if f.name == event.Committed {
					start(f.from)
				}
				continue
			}
			streams--
			if streams > 0 {
				continue
			}
			if f.err != nil {
				return f.err
			}
			start("")
		}
	}
}

// stream passes on what one process streams, and the end of that. A process that is
// being replaced may still accept: it is avoided. If there is nobody, and the client is
// to wait, stream waits.
func (c *client) stream(ctx context.Context, avoid string, pass func(followed)) {
	for {
		avoided, err := c.read(ctx, avoid, pass)
		if !avoided && !(c.wait && isNobody(err)) {
			pass(followed{ended: true, err: err})
			return
		}
		select {
		case <-time.After(repeatInterval):
		case <-ctx.Done(): // which the next attempt says
		}
	}
}

func (c *client) read(ctx context.Context, avoid string, pass func(followed)) (avoided bool, err error) {
	response, err := c.send(ctx, "events", true)
	if err != nil {
		return false, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		content, _ := io.ReadAll(response.Body)
		return false, errors.New(strings.TrimSpace(string(content)))
	}
	lines := bufio.NewScanner(response.Body)
	lines.Buffer(nil, maxLine)
	from := ""
	for lines.Scan() {
		var s step
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			return false, fmt.Errorf("what %s streams is unreadable: %w", c.socket, err)
		}
		if s.name == watching {
			from = fmt.Sprint(s.attrs["pid"])
			if from == avoid {
				return true, nil
			}
		}
		pass(followed{step: s, from: from})
	}
	return false, nil // however it has ended, the next generation may go on
}

// print writes a step as the user wants it.
func (c *client) print(s step) {
	line := s.String()
	if c.json {
		line = string(encode(s))
	}
	fmt.Fprintln(c.stdout, line)
}

// showProgress shows the steps of what is asked for next, until stop is called. It
// returns once it can see them. After a success, stop waits for the last one.
func (c *client) showProgress(ctx context.Context) (stop func(succeeded bool)) {
	ctx, cancel := context.WithCancel(ctx)
	begun, done, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	tellBegun, tellDone := sync.OnceFunc(func() { close(begun) }), sync.OnceFunc(func() { close(done) })
	go func() {
		defer close(ended)
		_ = c.follow(ctx, func(s step) {
			if s.name == watching {
				tellBegun()
				return
			}
			fmt.Fprintln(c.stderr, s)
			if s.name == event.Committed || s.name == event.Rehearsed {
				tellDone()
			}
		})
	}()
	// Without an event, the answer itself says why.
	await := func(event <-chan struct{}) {
		select {
		case <-event:
		case <-ended:
		case <-time.After(progressTimeout):
		}
	}
	await(begun)
	return func(succeeded bool) {
		if succeeded {
			await(done)
		}
		cancel()
		<-ended
	}
}
