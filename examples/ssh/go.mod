module example.com/tableflip/examples/ssh

go 1.26.0

require example.com/tableflip v0.0.0

replace example.com/tableflip => ../../
