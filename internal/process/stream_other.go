//go:build !unix

package process

import "os"

func Streams() (in, out, err *os.File) { return os.Stdin, os.Stdout, os.Stderr }

func isStream(*os.File) bool { return true }
