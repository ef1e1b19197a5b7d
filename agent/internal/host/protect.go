package host

import (
	"bytes"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Protect hides the agent from what runs beside it: its memory and
// environment cannot be read without CAP_SYS_PTRACE, and its environment is
// wiped. Call it first, when everything wanted from the environment was read.
func Protect() error {
	wipeEnvironment()
	os.Clearenv()
	unix.Umask(0o022)
	resetInternalSignals()
	if os.Geteuid() == 0 {
		// prlimit() on a process needs all its ids to be the caller's, or CAP_SYS_RESOURCE. With
		// a saved gid of its own no caller matches, so root inside cannot set emberd a CPU limit
		// (whose SIGKILL even PID 1 obeys) or take its descriptors.
		if err := syscall.Setresgid(0, 0, overflowID); err != nil {
			return err
		}
	}
	return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}

// overflowID is the kernel's `nobody`, mapped in every user namespace that maps a whole range.
const overflowID = 65534

// wipeEnvironment zeroes the strings the kernel put on the stack, which
// /proc/1/environ shows and os.Clearenv leaves.
func wipeEnvironment() {
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return
	}
	// Fields are counted after the parenthesised name, which may hold spaces: state is field 3.
	after := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	const envStart, envEnd = 50 - 3, 51 - 3
	if len(after) <= envEnd {
		return
	}
	from, err1 := strconv.ParseInt(string(after[envStart]), 10, 64)
	to, err2 := strconv.ParseInt(string(after[envEnd]), 10, 64)
	if err1 != nil || err2 != nil || from == 0 || to <= from || to-from > 1<<21 {
		return
	}
	mem, err := os.OpenFile("/proc/self/mem", os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer func() { _ = mem.Close() }()
	_, _ = mem.WriteAt(make([]byte, to-from), from)
}

// SurvivePipes makes a write to a closed stdout an error. Without it the Go
// runtime ends a program whose log's reader went away: a node that restarts.
func SurvivePipes() { signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE) }

// IgnoreSignals makes signals from inside the machine harmless. The kernel
// spares PID 1 those without a handler, but the Go runtime installs handlers
// and would die of, say, a sent SIGSEGV. They are caught rather than ignored,
// because ignoring is inherited by every process started.
func IgnoreSignals() {
	sink := make(chan os.Signal, 16)
	for n := unix.Signal(1); n < 65; n++ {
		switch n {
		case unix.SIGKILL, unix.SIGSTOP, unix.SIGCHLD, unix.SIGURG, unix.SIGPROF:
		default:
			signal.Notify(sink, n)
		}
	}
	go func() {
		for range sink {
		}
	}()
}
