//go:build !unix

package process

import "os/exec"

func startHint(*exec.Cmd, error) string { return "" }

func LimitHint(error) string { return "" }

func exitHint(string) string { return "" }

func binaryPath(cmd *exec.Cmd) string { return cmd.Path }

func isBusy(error) bool { return false }

func IsMounted(error) bool { return false }

func isNoChild(error) bool { return false }
