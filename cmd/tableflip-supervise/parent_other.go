//go:build !linux

package main

import "errors"

func setParentDeath(string) error { return errors.ErrUnsupported }
