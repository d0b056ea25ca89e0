//go:build linux

// Command chain is a generation of package handover's chains, and nothing else: what
// else the benchmarks import would make it start more slowly.
package main

import "example.com/tableflip/benchmarks/handover"

func main() { handover.Main() }
