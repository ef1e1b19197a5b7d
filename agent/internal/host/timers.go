package host

import (
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	// ordinarySlack is Linux's own; it is inherited by threads and programs.
	ordinarySlack = 50_000 // ns
	// monitorSlack reaches to the kernel's next tick.
	monitorSlack = 4_000_000 // ns
)

// RelaxMonitor makes the Go runtime's monitor thread share the kernel's ticks.
// While the agent works it sleeps for some 20 µs at a time, and in a virtual
// machine each such timer stops the virtual CPU three times. What it does,
// taking a processor from a thread that a system call blocks, can wait.
//
// It is the first thread that the runtime starts. Where it cannot be told (no
// /proc, no right), all stays as it is.
func RelaxMonitor() {
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	var threads []int
	for _, entry := range entries {
		if id, err := strconv.Atoi(entry.Name()); err == nil && id != os.Getpid() {
			threads = append(threads, id)
		}
	}
	if len(threads) == 0 {
		return
	}
	path := "/proc/" + strconv.Itoa(slices.Min(threads)) + "/timerslack_ns"
	_ = os.WriteFile(path, []byte(strconv.Itoa(monitorSlack)), 0)
}

// OrdinaryTimers gives the calling thread, which may be one that the monitor
// started, the timers that a program started from it expects.
func OrdinaryTimers() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, ordinarySlack, 0, 0, 0) }
