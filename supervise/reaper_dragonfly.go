package supervise

const procReapAcquire, procReapRelease = 1, 2 // sys/procctl.h
