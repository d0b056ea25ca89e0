package supervise

const procReapAcquire, procReapRelease = 2, 3 // sys/procctl.h
