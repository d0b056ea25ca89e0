module example.com/tableflip/internal/systemdtest

go 1.26.0

require example.com/tableflip v0.0.0

require github.com/cloudflare/tableflip v1.2.3

require golang.org/x/sys v0.49.0 // indirect

replace example.com/tableflip => ../../
