// Package benchmarks compares this project's library to cloudflare/tableflip, and
// both to the least that could do the same. It is a module of its own, so that
// tableflip does not become a dependency of the library. See README.md.
package benchmarks
