//go:build !linux

package process

// ContainerInit returns an empty string, because there are no containers.
func ContainerInit() string { return "" }
