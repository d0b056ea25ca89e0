//go:build unix && !linux

package descriptor

func setCloseOnExecAtOnce(first uintptr, n int) bool { return false }

func closeAtOnce(first uintptr, n int) bool { return false }
