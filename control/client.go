package control

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// This file owns the client: what tableflip-ctl does, and a service that is its own
// client.

// The exit statuses of Main.
const (
	exitDone    = 0
	exitFailed  = 1
	exitNobody  = 2
	exitRefused = 3
)

const usage = `usage: %s [-s socket] [-wait] [-json] upgrade|rehearse|status|stop|events

Asks a service at its control socket.

  upgrade   replaces the process, and waits until the new one is in charge
  rehearse  tries an upgrade, and ends the new process before it takes charge
  status    says who serves, since when, and how the last upgrade went
  stop      has the service drain and end
  events    follows the steps of upgrades from generation to generation

Flags:
`

const exits = `
Exit status: 0 done; 1 failed, and why is on the standard error; 2 nobody answers at the
socket; 3 refused for now.
`

// methods are what can be asked for.
var methods = map[string]string{
	"upgrade":  http.MethodPost,
	"rehearse": http.MethodPost,
	"stop":     http.MethodPost,
	"status":   http.MethodGet,
	"events":   http.MethodGet,
}

// repeatInterval is how often a question is repeated that met a process which was just
// being replaced.
const repeatInterval = 50 * time.Millisecond

// Main is the command tableflip-ctl: it takes the arguments that follow the command's
// name, writes to the standard output and error, and returns the exit status. Ctrl-C
// and SIGTERM end it, which aborts the upgrade that it waits for. With it, a service is
// its own client:
//
//	if *ctl != "" {
//		os.Exit(control.Main("-s", socket, *ctl))
//	}
//
// Call it before tableflip.New.
func Main(arguments ...string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c, err := parse(arguments, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitDone
	case err != nil:
		return exitFailed
	}
	return c.run(ctx)
}

// A client asks one question.
type client struct {
	socket   string
	question string
	wait     bool
	json     bool
	stdout   io.Writer
	stderr   io.Writer
	progress bool // to stderr
	http     *http.Client
}

func parse(arguments []string, stderr *os.File) (*client, error) {
	c := &client{stdout: os.Stdout, stderr: stderr}
	flags := flag.NewFlagSet(os.Args[0], flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&c.socket, "s", os.Getenv("TABLEFLIP_CONTROL"), "the control `socket` of the service; by default $TABLEFLIP_CONTROL")
	flags.BoolVar(&c.wait, "wait", false, "wait for other upgrades, and for a process that drains, instead of being refused")
	flags.BoolVar(&c.json, "json", false, "print JSON")
	flags.Usage = func() {
		fmt.Fprintf(stderr, usage, os.Args[0])
		flags.PrintDefaults()
		fmt.Fprint(stderr, exits)
	}
	if err := flags.Parse(arguments); err != nil {
		return nil, err
	}
	c.question = flags.Arg(0)
	var err error
	switch {
	case flags.NArg() != 1 || methods[c.question] == "":
		err = fmt.Errorf("it takes one of upgrade, rehearse, status, stop and events, not %q", flags.Args())
	case c.socket == "":
		err = errors.New("it takes the path of a socket: -s")
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
		flags.Usage()
		return nil, err
	}
	c.progress = !c.json && isTerminal(stderr)
	c.http = &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", c.socket)
		},
	}}
	return c, nil
}

// isTerminal is true for the null device, too, to which it does no harm to write.
func isTerminal(file *os.File) bool {
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

func (c *client) run(ctx context.Context) int {
	if c.question == "events" {
		return c.fail(ctx, c.follow(ctx, c.print))
	}
	stop := func(bool) {}
	if c.progress && (c.question == "upgrade" || c.question == "rehearse") {
		stop = c.showProgress(ctx)
	}
	code, content, err := c.ask(ctx)
	stop(err == nil && code == http.StatusOK)
	if err != nil {
		return c.fail(ctx, err)
	}
	return c.report(code, content)
}

// report prints an answer, and returns the exit status.
func (c *client) report(code int, content []byte) int {
	if code == http.StatusOK || c.json {
		_, _ = c.stdout.Write(content)
	}
	if code == http.StatusOK {
		return exitDone
	}
	text := strings.TrimSpace(string(content))
	var r result
	if c.json && json.Unmarshal(content, &r) == nil {
		text = r.Error
	}
	fmt.Fprintln(c.stderr, text)
	if code == http.StatusConflict {
		return exitRefused
	}
	return exitFailed
}

// fail prints why there is no answer, and returns the exit status.
func (c *client) fail(ctx context.Context, err error) int {
	switch {
	case ctx.Err() != nil && c.question == "events":
		return exitDone
	case ctx.Err() != nil:
		fmt.Fprintf(c.stderr, "interrupted: %s is aborted, unless it has just succeeded\n", c.question)
	case isNobody(err):
		fmt.Fprintf(c.stderr, "nobody answers at %s: %v\n", c.socket, err)
		return exitNobody
	default:
		fmt.Fprintln(c.stderr, err)
	}
	return exitFailed
}

// ask returns the answer. If it is to wait, that is not the refusal of a process that
// was just replaced, but what the next one answers.
func (c *client) ask(ctx context.Context) (code int, content []byte, err error) {
	for {
		code, content, err = c.askOnce(ctx)
		if code != http.StatusConflict || !c.wait {
			return code, content, err
		}
		select {
		case <-time.After(repeatInterval):
		case <-ctx.Done(): // which the next attempt says
		}
	}
}

func (c *client) askOnce(ctx context.Context) (code int, content []byte, err error) {
	response, err := c.send(ctx, c.question, c.json)
	if err != nil {
		return 0, nil, err
	}
	defer response.Body.Close()
	content, err = io.ReadAll(response.Body)
	if err != nil {
		err = fmt.Errorf("the process ended before it had answered: %w", err)
	}
	return response.StatusCode, content, err
}

func (c *client) send(ctx context.Context, question string, asJSON bool) (*http.Response, error) {
	query := url.Values{}
	if asJSON {
		query.Set("json", "1")
	}
	if c.wait {
		query.Set("wait", "1")
	}
	request, err := http.NewRequestWithContext(ctx, methods[question], "http://control/"+question+"?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	response, err := c.http.Do(request)
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		err = wrapped.Err // without the address, which says nothing
	}
	return response, err
}
