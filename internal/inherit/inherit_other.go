//go:build !unix

package inherit

func isPipe(int, string) bool { return false }

func isOpen(int) bool { return false }

func setCloseOnExec(first, last int) {}
