//go:build !unix

package process

import "os/exec"

func startHint(*exec.Cmd, error) string { return "" }

func LimitHint(error) string { return "" }

func ExitHint(string) string { return "" }

func isBusy(error) bool { return false }

func IsMounted(error) bool { return false }
