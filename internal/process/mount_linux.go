package process

import (
	"os"
	"strings"
)

// IsStaleMount reports whether path is a file that is mounted by itself, and whose
// source has been replaced since: the mount shows the old file for ever
// (proc_pid_mountinfo(5)).
func IsStaleMount(path string) bool {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(mounts)) {
		// ID PARENT MAJOR:MINOR ROOT MOUNTPOINT …
		fields := strings.Fields(line)
		if len(fields) > 4 && unescapeMount(fields[4]) == path {
			return strings.HasSuffix(fields[3], "//deleted")
		}
	}
	return false
}

// unescapeMount undoes what the kernel does to characters that separate fields.
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace
