module example.com/tableflip/examples/dns

go 1.26.0

require (
	example.com/tableflip v0.0.0
	github.com/miekg/dns v1.1.73
)

require (
	golang.org/x/net v0.57.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
)

replace example.com/tableflip => ../../
