// Command queue takes jobs over HTTP and does them one at a time, in the order in which they
// came, while it is upgraded. A job is a file in the directory -spool; to do it is to write a
// line to the file done there. Flags and signals are those of the http example.
//
// What is promised: no job is lost, and no two processes of the service do jobs at the same
// time, whether an upgrade succeeds, fails, or ends in a crash. The old process ends the job
// that it has begun; the new one begins when the old one has ended. Jobs are taken all the
// time. What is left when the service is stopped is done after the next start.
//
// What is not: from an upgrade until the old process's requests have drained nobody does a
// job, so keep -drain short. A job that is cut, by that or by a crash, may be done twice.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8080", "`address` to serve on, or the path of a Unix socket")
	spool := flag.String("spool", ".", "`directory` of the jobs")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	drain := flag.Duration("drain", 10*time.Second, "how long requests and a job may take to end before the process exits")
	flag.Parse()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile, Logger: slog.Default()})
	if err == nil {
		q := queue(*spool)
		err = service.Run(upg, service.Options{DrainTimeout: *drain, IdleGrace: 100 * time.Millisecond},
			service.HTTP(&http.Server{Addr: *listen, Handler: q}),
			service.Background(q.consume))
	}
	if err != nil {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

type queue string // the directory of its jobs

// ServeHTTP adds a job.
func (q queue) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	job, err := io.ReadAll(r.Body)
	name := filepath.Join(string(q), fmt.Sprintf("%020d-%d", time.Now().UnixNano(), os.Getpid()))
	if err == nil {
		err = errors.Join(os.WriteFile(name+".new", job, 0o600), os.Rename(name+".new", name+".job"))
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	fmt.Fprintf(w, "version=%s pid=%d queued\n", version, os.Getpid())
}

// consume does jobs until ctx ends, which it looks at between two of them.
func (q queue) consume(ctx context.Context) error {
	for poll := time.NewTicker(10 * time.Millisecond); ctx.Err() == nil; {
		jobs, _ := filepath.Glob(filepath.Join(string(q), "*.job"))
		for _, job := range jobs {
			if err := q.do(job); err != nil || ctx.Err() != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
		case <-poll.C:
		}
	}
	return nil
}

func (q queue) do(job string) error {
	content, err := os.ReadFile(job)
	if err != nil {
		return err
	}
	done, err := os.OpenFile(filepath.Join(string(q), "done"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(done, "%d %s\n", os.Getpid(), content)
	return errors.Join(err, done.Close(), os.Remove(job))
}
