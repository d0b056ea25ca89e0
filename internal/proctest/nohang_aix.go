package proctest

// noHang is WNOHANG, which packages syscall and unix lack here.
const noHang = 1
