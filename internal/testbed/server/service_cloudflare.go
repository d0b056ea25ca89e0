//go:build linux && cloudflare

package main

import "errors"

func runService(config) error { return errors.New("this library has no package service") }
