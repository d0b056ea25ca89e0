//go:build !unix

package tableflip

// These platforms cannot pass a listener to another process the way that this
// package does. New says so, and nothing else here is ever reached.

const supported = false

func duplicate(uintptr) (int, error)            { return -1, ErrNotSupported }
func replace(uintptr, uintptr) error            { return ErrNotSupported }
func setCloseOnExec(uintptr) error              { return ErrNotSupported }
func setNonblock(uintptr, bool) error           { return ErrNotSupported }
func closeDescriptor(uintptr) error             { return ErrNotSupported }
func atEnd(uintptr) bool                        { return false }
func identifyPipe(uintptr) (identity, error)    { return identity{}, ErrNotSupported }
func identifySocket(uintptr) (socket, error)    { return socket{}, ErrNotSupported }
func socketRights(uintptr) []byte               { return nil }
func sendMessage(uintptr, []byte, []byte) error { return ErrNotSupported }
func isBlocked(error) bool                      { return false }
func isAddressInUse(error) bool                 { return false }
func isRefused(error) bool                      { return false }
func adviseLimit(error) string                  { return "" }
func isNotOpen(error) bool                      { return false }
func adviseStart(error) string                  { return "" }
