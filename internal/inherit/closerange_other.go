//go:build unix && (!linux || mips || mipsle || mips64 || mips64le)

package inherit

func setCloseOnExecAtOnce(first, last int) bool { return false }
