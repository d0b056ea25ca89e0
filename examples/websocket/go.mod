module example.com/tableflip/examples/websocket

go 1.26.0

require example.com/tableflip v0.0.0

require (
	github.com/coder/websocket v1.8.15
	golang.org/x/sys v0.49.0 // indirect
)

replace example.com/tableflip => ../../
