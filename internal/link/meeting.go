package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"example.com/tableflip/internal/descriptor"
)

// Files is the part of an Upgrader that a Meeting needs.
type Files interface {
	File(name string) (*os.File, error)
	AddFile(name string, file *os.File) error
	RemoveFile(name string) error
}

// A Meeting is where a generation meets those that are older, and its children. Its
// methods are safe for concurrent use.
type Meeting struct {
	older  []*Link
	point  *os.File
	claims chan *Link // holds the newest one that nobody has accepted; closed at the end
}

// Join claims at the points of all older generations, and makes one for the children of
// this process. Every generation calls it before Ready, and before Files, which would
// claim the points as files of the program. It does not wait for the other processes:
// one that is suspended holds nothing up. Several meetings of different names may exist.
func Join(files Files, name string) (*Meeting, error) {
	m := &Meeting{claims: make(chan *Link, 1)}
	if err := m.join(files, name); err != nil {
		closeLinks(m.older)
		return nil, fmt.Errorf("tableflip: join the meeting %q: %w", name, err)
	}
	go m.watch()
	return m, nil
}

func (m *Meeting) join(files Files, name string) error {
	if err := m.joinOlder(files, name); err != nil {
		return err
	}
	point, childEnd, err := pair()
	if err != nil {
		return err
	}
	defer childEnd.Close()
	if err := files.AddFile(name, childEnd); err != nil {
		point.Close()
		return err
	}
	m.point = point
	return nil
}

// joinOlder claims at the points of all older generations, and passes on those of the ones
// that live.
func (m *Meeting) joinOlder(files Files, name string) error {
	var living []*os.File
	defer func() { closeAll(living) }()
	for i := 0; ; i++ {
		point, err := files.File(numbered(name, i))
		if err != nil {
			return err
		}
		if point == nil {
			break
		}
		l, err := claim(point)
		if err != nil {
			point.Close()
			return err
		}
		isParent, isDead := i == 0, errors.Is(context.Cause(l.open), io.EOF)
		if isParent || !isDead {
			m.older = append(m.older, l)
		}
		if isDead {
			point.Close()
		} else {
			living = append(living, point)
		}
		if isParent {
			continue // this process takes its name
		}
		if err := files.RemoveFile(numbered(name, i)); err != nil {
			return err
		}
	}
	for i, point := range living {
		if err := files.AddFile(numbered(name, i+1), point); err != nil {
			return err
		}
	}
	return nil
}

// numbered returns the name of the point of the nth generation before the parent.
func numbered(name string, n int) string {
	if n == 0 {
		return name
	}
	return fmt.Sprintf("%s.%d", name, n)
}

// claim returns a link to the generation whose point this is. If that is dead, the link
// ends at once. If it cannot be reached, the link says why.
func claim(point *os.File) (*Link, error) {
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	l := newLink(ours)
	err = descriptor.Control(theirs, func(fd uintptr) error {
		_, err := send(point, []byte{'c'}, []int{int(fd)}, false)
		return err
	})
	if err != nil {
		l.fail(err)
	}
	return l, nil
}

// watch takes claims out of the point, whose queue failed children would fill
// otherwise, and keeps the newest.
func (m *Meeting) watch() {
	defer close(m.claims)
	for {
		_, ends, err := receive(m.point, make([]byte, 1))
		if err != nil && err != errLost {
			return
		}
		// What has no deadlines would block this process, and is no link's end.
		if len(ends) != 1 || ends[0].SetDeadline(time.Time{}) != nil {
			closeAll(ends)
			continue
		}
		select {
		case before := <-m.claims:
			before.Close()
		default:
		}
		m.claims <- newLink(ends[0])
	}
}

// Older returns the links to the generations that were in charge before this one and
// know links, the youngest first. The links belong to the Meeting, which always returns
// the same ones. Do not Receive from them before Ready has returned. The link to a
// generation that is dead ends with io.EOF.
func (m *Meeting) Older() []*Link { return m.older }

// Accept returns a link to a process that has joined after this one: the child, and
// once that is replaced while this process drains, its successor. Each is returned
// once, and the caller owns it. Of several that nobody has accepted yet only the newest
// is kept, because those before it have failed, or were replaced.
//
// A child may have failed since it joined: its link then ends with io.EOF, and the next
// child's comes by another Accept. Once Upgrade has returned nil, the link to a child
// that knows links is there.
//
// Accept blocks until there is a link, until ctx is done, or until nobody can join any
// more, which is io.EOF: after Close, and once this process is replaced by a version
// that does not know links. The latter goes unnoticed while a wrapper of the service,
// such as a shell, keeps the point open.
func (m *Meeting) Accept(ctx context.Context) (*Link, error) {
	select {
	case l, ok := <-m.claims:
		if !ok {
			return nil, io.EOF
		}
		return l, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Close closes all links except those that Accept has returned. Processes that join
// later do not find this one. It leaves the registry alone.
func (m *Meeting) Close() error {
	m.point.Close()
	for l := range m.claims { // ends at once, now that the point is closed
		l.Close()
	}
	closeLinks(m.older)
	return nil
}

func closeLinks(links []*Link) {
	for _, l := range links {
		l.Close()
	}
}
