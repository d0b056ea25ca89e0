package process

import (
	"os"
	"slices"
	"strings"
)

// containerInits are programs that end with the one process that they have started,
// whatever other processes there are.
var containerInits = []string{"tini", "docker-init", "dumb-init", "catatonit"}

// ContainerInit returns the name of PID 1 if it is the parent of this process and one of
// containerInits.
func ContainerInit() string {
	if os.Getppid() != 1 {
		return ""
	}
	comm, err := os.ReadFile("/proc/1/comm")
	name := strings.TrimSpace(string(comm))
	if err != nil || !slices.Contains(containerInits, name) {
		return ""
	}
	return name
}
