package tableflip

import (
	"fmt"
	"os"
	"strings"
	"sync"

	"example.com/tableflip/internal/nametable"
)

// This file owns the environment variables that carry the name table
// (internal/nametable).

// pending holds the variables of a table between being taken out of the
// environment and being used, so that a New that failed can be tried again and
// a child with an unreadable table never becomes a first generation.
var pending struct {
	sync.Mutex
	variables map[string]string
}

// takeVariables moves the variables of a table out of the environment, where
// this process's own children would see them. It returns nil if there are none.
func takeVariables() (map[string]string, error) {
	pending.Lock()
	defer pending.Unlock()
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		if !nametable.IsVariable(name) {
			continue
		}
		if err := os.Unsetenv(name); err != nil {
			return nil, fmt.Errorf("tableflip: remove %s from the environment: %w", name, err)
		}
		if pending.variables == nil {
			pending.variables = make(map[string]string)
		}
		pending.variables[name] = value
	}
	return pending.variables, nil
}

// forgetVariables is called once the table has been used.
func forgetVariables() {
	pending.Lock()
	defer pending.Unlock()
	pending.variables = nil
}
