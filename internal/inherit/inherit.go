// Package inherit takes over what a parent passed to this process, before any other code
// can lose it or pass it on: it removes the variables of the name table from the
// environment, and sets close-on-exec on the descriptors.
//
// It does so when it is initialised. Go initialises packages that are ready in the order
// of their import paths. This package imports syscall alone, so that no package that can
// start processes (those that import os) is ready before it.
package inherit

import "syscall"

const (
	// Variable is the name of the name table's first variable. The names of the others
	// are Variable, an underscore and a number.
	Variable = "TABLEFLIP_HANDOVER"

	// marker names the variable with the PID of the process that took a table. If that
	// process then executes a program anew, the variable says why there is no table.
	marker = "TABLEFLIP_TAKEN"
)

// Upstream is the name of the variable by which a parent with another library says that it
// is one: see package upstream. That library never removes it.
const Upstream = "TABLEFLIP_HAS_PARENT_7DIU3"

// The child's ends of the pipes, and the first descriptor after them.
const (
	ReadyFD = 3 + iota
	VerdictFD
	FirstFD
)

// IsVariable reports whether an environment variable of this name is part of a table.
func IsVariable(name string) bool {
	return len(name) >= len(Variable) && name[:len(Variable)] == Variable &&
		(len(name) == len(Variable) || name[len(Variable)] == '_')
}

// taken holds what this process found at its start.
var taken = take(syscall.Environ())

type found struct {
	variables map[string]string // nil if there was no table
	lost      bool              // an earlier image of this process took a table
	upstream  bool              // there was the variable of that name
}

// take moves the variables of a table out of the environment.
func take(environ []string) (f found) {
	pid := utoa(uint64(syscall.Getpid()))
	for _, variable := range environ {
		name, value := cut(variable, '=')
		switch {
		case name == marker:
			f.lost = value == pid
			syscall.Unsetenv(name)
		case name == Upstream:
			f.upstream = true // which stays, for programs that link both libraries
		case IsVariable(name):
			if f.variables == nil {
				f.variables = make(map[string]string)
			}
			f.variables[name] = value
			syscall.Unsetenv(name)
		}
	}
	if f.upstream && isPipe(ReadyFD, anyPipe) && isPipe(VerdictFD, anyPipe) {
		// How many descriptors there are is in the pipe.
		last := VerdictFD
		for isOpen(last + 1) {
			last++
		}
		setCloseOnExec(ReadyFD, last)
	}
	if f.variables == nil {
		return f
	}
	f.lost = false
	if closeOnExec(f.variables[Variable]) {
		syscall.Setenv(marker, pid)
	}
	return f
}

// Variables returns the table's variables, or nil if there was no table. It returns the
// same until Forget is called, so that New can be called again after an error, and a
// process with an unreadable table never becomes a first generation.
func Variables() map[string]string { return taken.variables }

// Lost reports whether this process took a table and then executed this program, which did
// not inherit the table.
func Lost() bool { return taken.lost }

// HasUpstream reports whether this process was started with the variable of that name.
func HasUpstream() bool { return taken.upstream }

// ForgetUpstream removes that variable. It is called once this library is used.
func ForgetUpstream() { syscall.Unsetenv(Upstream) }

// Forget is called once the table has been used. It is safe to call twice.
func Forget() {
	taken = found{upstream: taken.upstream}
	syscall.Unsetenv(marker)
}

// anyPipe identifies no pipe, so that any is taken for it.
const anyPipe = "0:0"

// closeOnExec sets close-on-exec on the descriptors that the header announces, if the
// first two are the pipes that it names. It reports whether they are: those of a table
// that has leaked are not.
func closeOnExec(header string) bool {
	_, rest := cut(header, ' ')
	ready, rest := cut(rest, ' ')
	verdict, words := cut(rest, ' ')
	if !isPipe(ReadyFD, ready) || !isPipe(VerdictFD, verdict) {
		return false
	}

	count := 0
	for words != "" {
		var word string
		word, words = cut(words, ' ')
		if name, value := cut(word, '='); name == "fds" {
			count = atoi(value)
		}
	}
	setCloseOnExec(ReadyFD, FirstFD+count-1)
	return true
}

// These functions stand for those of packages strings and strconv, which are ready too
// late.

func cut(s string, separator byte) (before, after string) {
	for i := range len(s) {
		if s[i] == separator {
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}

func utoa(n uint64) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return utoa(n/10) + string(rune('0'+n%10))
}

// atoi returns 0 if s is not a number of descriptors.
func atoi(s string) int {
	n := 0
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' || n > 1<<20 {
			return 0
		}
		n = 10*n + int(s[i]-'0')
	}
	return n
}
