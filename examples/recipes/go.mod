module example.com/tableflip/examples/recipes

go 1.26.0

require (
	example.com/tableflip v0.0.0
	github.com/oklog/run v1.2.0
	go.uber.org/fx v1.24.0
)

require (
	go.uber.org/dig v1.19.0 // indirect
	go.uber.org/multierr v1.10.0 // indirect
	go.uber.org/zap v1.26.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
)

replace example.com/tableflip => ../../
