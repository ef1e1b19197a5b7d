package host

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Signals 32 to 34 are the C library's own. An older glibc's posix_spawn leaves the first ignored in
// what it starts, the Go runtime does not touch them, and a child would inherit it.
const firstInternal, lastInternal = 32, 34

// kernelAction is the kernel's struct sigaction on 64-bit Linux.
type kernelAction struct {
	handler  uintptr
	flags    uint64
	restorer uintptr
	mask     uint64
}

const (
	defaultHandler = 0
	ignoredHandler = 1
)

// resetInternalSignals gives ignored internal signals their default action
// back, so that started processes have no ignored signal.
func resetInternalSignals() {
	for number := uintptr(firstInternal); number <= lastInternal; number++ {
		var current kernelAction
		size := unsafe.Sizeof(current.mask)
		if !action(number, nil, &current, size) || current.handler != ignoredHandler {
			continue
		}
		action(number, &kernelAction{handler: defaultHandler}, nil, size)
	}
}

func action(number uintptr, wanted, current *kernelAction, size uintptr) bool {
	_, _, errno := unix.RawSyscall6(
		unix.SYS_RT_SIGACTION, number,
		uintptr(unsafe.Pointer(wanted)), uintptr(unsafe.Pointer(current)), size, 0, 0,
	)
	return errno == 0
}
