module example.com/tableflip/examples/ssh

go 1.26.0

require example.com/tableflip v0.0.0

require (
	golang.org/x/crypto v0.58.0
	golang.org/x/sys v0.50.0 // indirect
)

replace example.com/tableflip => ../../
