package control

import "time"

// SetPatience sets how long this process waits for others. It returns a function that
// undoes this.
func SetPatience(d time.Duration) (restore func()) {
	send, progress, shut := sendTimeout, progressTimeout, closeTimeout
	sendTimeout, progressTimeout, closeTimeout = d, d, d
	return func() { sendTimeout, progressTimeout, closeTimeout = send, progress, shut }
}
