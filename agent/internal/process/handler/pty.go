package handler

import (
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"

	pb "emberbox/agent/gen/process"
)

// Sizes of a terminal whose client gave none.
const (
	defaultCols = 80
	defaultRows = 24
)

// openPTY opens a pseudo-terminal pair. Called as the user, because devpts
// gives the terminal to the one who opens it.
func openPTY(size *pb.PTY_Size) (master, terminal int, err error) {
	master, err = unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("open /dev/ptmx: %w", err)
	}
	defer func() {
		if err != nil {
			_ = unix.Close(master)
		}
	}()
	if err = unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return -1, -1, fmt.Errorf("unlock terminal: %w", err)
	}
	// TIOCGPTPEER opens the very peer, whatever is mounted at /dev/pts; gVisor and old kernels lack it.
	const flags = unix.O_RDWR | unix.O_NOCTTY | unix.O_CLOEXEC
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, flags)
	terminal = int(peer)
	if errno != 0 {
		var n int
		if n, err = unix.IoctlGetInt(master, unix.TIOCGPTN); err != nil {
			return -1, -1, fmt.Errorf("number of terminal: %w", err)
		}
		terminal, err = unix.Open("/dev/pts/"+strconv.Itoa(n), flags, 0)
		if err != nil {
			return -1, -1, fmt.Errorf("open terminal: %w", err)
		}
	}
	if err = resize(master, size); err != nil {
		_ = unix.Close(terminal)
		return -1, -1, err
	}
	return master, terminal, nil
}

func resize(master int, size *pb.PTY_Size) error {
	cols, rows := size.GetCols(), size.GetRows()
	if cols == 0 {
		cols = defaultCols
	}
	if rows == 0 {
		rows = defaultRows
	}
	ws := unix.Winsize{Col: uint16(min(cols, 0xffff)), Row: uint16(min(rows, 0xffff))}
	if err := unix.IoctlSetWinsize(master, unix.TIOCSWINSZ, &ws); err != nil {
		return fmt.Errorf("set size of terminal: %w", err)
	}
	return nil
}
