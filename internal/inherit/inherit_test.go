//go:build unix

package inherit

import (
	"maps"
	"os"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// variables are those of a table whose pipes are not there.
var variables = map[string]string{
	Variable:         "1 1:2 3:4 fds=1 parts=1",
	Variable + "_0":  "fd,a",
	Variable + "_17": "more",
}

func TestTakeVariables(t *testing.T) {
	foreign := []string{Variable + "S", "X" + Variable, "TABLEFLIP_OTHER"}
	for _, name := range foreign {
		t.Setenv(name, "foreign")
	}
	for name, value := range variables {
		t.Setenv(name, value)
	}
	got := take(os.Environ())
	if !maps.Equal(got.variables, variables) || got.lost {
		t.Errorf("took %v", got)
	}
	for name := range variables {
		if _, ok := os.LookupEnv(name); ok {
			t.Errorf("%s is still there", name)
		}
	}
	for _, name := range foreign {
		if _, ok := os.LookupEnv(name); !ok {
			t.Errorf("%s, which belongs to someone else, is gone", name)
		}
	}
	if _, ok := os.LookupEnv(marker); ok {
		t.Error("there is a marker, and no descriptor was taken")
	}
	if got := take(os.Environ()); got.variables != nil {
		t.Errorf("took %v twice", got)
	}
}

func TestTakeUpstream(t *testing.T) {
	t.Setenv(Upstream, "yes")
	t.Setenv(Upstream+"_OTHER", "foreign")
	got := take(os.Environ())
	if !got.upstream || got.variables != nil {
		t.Errorf("took %v", got)
	}
	if _, ok := os.LookupEnv(Upstream); !ok {
		t.Error("the variable is gone before anybody has used this library")
	}
	ForgetUpstream()
	if _, ok := os.LookupEnv(Upstream); ok {
		t.Error("the variable is still there")
	}
	if _, ok := os.LookupEnv(Upstream + "_OTHER"); !ok {
		t.Error("the variable of someone else is gone")
	}
	if got := take(os.Environ()); got.upstream {
		t.Error("took it twice")
	}
}

func TestTakeNothing(t *testing.T) {
	if got := take([]string{"", "=", "PATH=/bin", "TABLEFLIP"}); got.variables != nil || got.lost {
		t.Errorf("took %v", got)
	}
}

func TestTakeMarker(t *testing.T) {
	tests := []struct {
		name, value string
		lost        bool
	}{
		{"own", strconv.Itoa(os.Getpid()), true},
		{"another's", strconv.Itoa(os.Getppid()), false},
		{"garbled", "x", false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv(marker, test.value)
			if got := take(os.Environ()); got.lost != test.lost || got.variables != nil {
				t.Errorf("took %v, want lost %v", got, test.lost)
			}
			if _, ok := os.LookupEnv(marker); ok {
				t.Error("the marker is still there")
			}
			// A table is news, whatever there was before.
			table := slices.Concat([]string{marker + "=" + test.value}, []string{Variable + "=garbled"})
			if got := take(table); got.lost || got.variables == nil {
				t.Errorf("with a table, took %v", got)
			}
		})
	}
}

func TestNumbers(t *testing.T) {
	for _, n := range []int{0, 7, 10, 9876, 1234567, 10 << 20} {
		if got := utoa(uint64(n)); got != strconv.Itoa(n) {
			t.Errorf("utoa(%d) = %q", n, got)
		}
		if got := atoi(strconv.Itoa(n)); got != n {
			t.Errorf("atoi of %d is %d", n, got)
		}
	}
	for _, text := range []string{"x", "-1", "1x", "10485770", "99999999999999999999"} {
		if got := atoi(text); got != 0 {
			t.Errorf("atoi(%q) = %d", text, got)
		}
	}
}

func TestForget(t *testing.T) {
	before := taken
	t.Cleanup(func() { taken = before })
	taken = found{variables: variables, lost: true, upstream: true}
	t.Setenv(marker, "1")
	Forget()
	if !HasUpstream() {
		t.Error("what another library's variable said is forgotten with the table")
	}
	if Variables() != nil || Lost() {
		t.Errorf("still known: %v, lost %v", Variables(), Lost())
	}
	if _, ok := os.LookupEnv(marker); ok {
		t.Error("the marker is still there")
	}
}

func TestSetCloseOnExec(t *testing.T) {
	const first, last = 200, 204
	for _, set := range []func(first, last int){setCloseOnExec, setCloseOnExecEach} {
		for fd := first; fd <= last; fd++ {
			if _, err := unix.FcntlInt(1, unix.F_DUPFD, fd); err != nil {
				t.Fatal(err)
			}
		}
		unix.Close(first + 1) // lost on the way, which New finds out
		set(first, last)
		for fd := first; fd <= last; fd++ {
			flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
			if fd != first+1 && (err != nil || flags&unix.FD_CLOEXEC == 0) {
				t.Errorf("descriptor %d: flags %d, %v", fd, flags, err)
			}
			unix.Close(fd)
		}
	}
}
