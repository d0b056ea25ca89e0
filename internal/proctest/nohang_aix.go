package proctest

// noHang is WNOHANG, which packages syscall and unix do not have on AIX.
const noHang = 1
