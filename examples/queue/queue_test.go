//go:build unix

package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"example.com/tableflip/internal/exampletest"
	"example.com/tableflip/internal/proctest"
)

func TestMain(m *testing.M) { exampletest.Main(m) }

// jobs are what clients have queued.
type jobs struct {
	spool string
	n     atomic.Int64
}

func start(t *testing.T) (*exampletest.Service, *jobs) {
	t.Helper()
	j := &jobs{spool: t.TempDir()}
	return exampletest.Start(t, "-spool", j.spool), j
}

// queuing queues a job on a connection of its own.
func (j *jobs) queuing(s *exampletest.Service) exampletest.ClientFunc {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	return func() (string, error) {
		response, err := client.Post("http://"+s.Addr(), "text/plain", strings.NewReader(fmt.Sprint(j.n.Add(1))))
		if err != nil {
			return "", err
		}
		defer response.Body.Close()
		answer, err := io.ReadAll(response.Body)
		return string(answer), err
	}
}

// wantOnce checks that every job was done once or is still there, by one process after
// the other, and that most of so many processes did some.
func (j *jobs) wantOnce(t *testing.T, processes int) {
	t.Helper()
	seen := map[string]int{}
	var pids []string
	done := proctest.Must(os.ReadFile(filepath.Join(j.spool, "done")))
	for line := range strings.Lines(string(done)) {
		pid, job, _ := strings.Cut(strings.TrimSpace(line), " ")
		seen[job]++
		if len(pids) > 0 && pids[len(pids)-1] == pid {
			continue
		}
		if slices.Contains(pids, pid) {
			t.Errorf("process %s has done jobs while another did", pid)
		}
		pids = append(pids, pid)
	}
	for _, file := range proctest.Must(filepath.Glob(filepath.Join(j.spool, "*.job"))) {
		seen[string(proctest.Must(os.ReadFile(file)))]++
	}
	for n := range j.n.Load() {
		if times := seen[fmt.Sprint(n+1)]; times != 1 {
			t.Errorf("job %d was done %d times", n+1, times)
		}
	}
	if len(pids) < processes/2 {
		t.Errorf("%d of %d processes have done jobs", len(pids), processes)
	}
	t.Logf("%d jobs, done by %d processes", j.n.Load(), len(pids))
}

func TestUpgradeUnderLoad(t *testing.T) {
	s, j := start(t)
	s.UpgradeUnderLoad(nil, j.queuing(s), j.queuing(s))
	j.wantOnce(t, 21)
}

func TestSurviveFailures(t *testing.T) {
	s, j := start(t)
	s.SurviveFailures(j.queuing(s), j.queuing(s))
	j.wantOnce(t, 2)
}
