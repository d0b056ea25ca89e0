//go:build linux

package handover

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"example.com/tableflip/internal/step"
)

// This file notes when the two processes of an upgrade come to which step.

// timelineVariable has the generations of a chain note it.
const timelineVariable = "BENCHMARK_TIMELINE"

// A Timeline says when the two processes of an upgrade came to which mark, by
// CLOCK_MONOTONIC, in nanoseconds. Beside those below, its marks are the steps of package
// step, of which the floor has some.
type Timeline map[string]int64

// The marks of the old process.
const (
	UpgradeCalled   = "upgrade called"
	ExitClosed      = "exit closed"
	UpgradeReturned = "upgrade returned"
)

// The marks of the new process.
const (
	MainCalled    = "main called"
	NewReturned   = "new returned"
	ReadyCalled   = "ready called"
	ReadyReturned = "ready returned"
)

// marks are those of this process. They are formatted when they are told, because what that
// allocates would be measured, too.
var marks struct {
	sync.Mutex
	isWanted bool
	list     []timedMark
}

type timedMark struct {
	name string
	at   int64
}

// wantMarks begins to note the steps, if somebody wants them.
func wantMarks() {
	marks.isWanted = os.Getenv(timelineVariable) != ""
	if !marks.isWanted {
		return
	}
	marks.list = make([]timedMark, 0, 64)
	step.SetHook(func(s step.Step) { mark(s.String(), monotonic()) })
}

// mark notes that the process came to a step at that time.
func mark(name string, at int64) {
	if !marks.isWanted {
		return
	}
	marks.Lock()
	defer marks.Unlock()
	marks.list = append(marks.list, timedMark{name, at})
}

// The prefixes of a generation's answers with its marks, as a new and as an old process.
const (
	newMarks = "marks-new "
	oldMarks = "marks-old "
)

// tellMarks answers with the marks since the last time.
func tellMarks(prefix string) {
	if !marks.isWanted {
		return
	}
	marks.Lock()
	defer marks.Unlock()
	var all []string
	for _, m := range marks.list {
		all = append(all, strconv.FormatInt(m.at, 10)+"="+m.name)
	}
	fmt.Println(prefix + strings.Join(all, ","))
	marks.list = marks.list[:0]
}

// StartTimed does what Start does, with generations that note their marks.
func StartTimed(binary string, c Contender, n int) (*Chain, error) {
	ch, err := startChain(binary, c, n, 0, timelineVariable+"=yes")
	if err != nil {
		return nil, err
	}
	if err := ch.hearMarks(newMarks, make(Timeline)); err != nil { // of the first generation
		return nil, errors.Join(err, ch.Close())
	}
	return ch, nil
}

// Timeline returns that of the last upgrade. The chain must have been started by
// StartTimed.
func (ch *Chain) Timeline() (Timeline, error) {
	t := make(Timeline)
	return t, errors.Join(ch.hearMarks(oldMarks, t), ch.hearMarks(newMarks, t))
}

func (ch *Chain) hearMarks(prefix string, t Timeline) error {
	line, err := ch.next(prefix)
	if err != nil {
		return err
	}
	for mark := range strings.SplitSeq(strings.TrimSpace(strings.TrimPrefix(line, prefix)), ",") {
		at, name, _ := strings.Cut(mark, "=")
		if t[name], err = strconv.ParseInt(at, 10, 64); err != nil {
			return fmt.Errorf("%q: %w", line, err)
		}
	}
	return nil
}
