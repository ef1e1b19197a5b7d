package host

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Collapsed is what a collapse did, in the words of the agent's OpenAPI page.
type Collapsed struct {
	Regions     int   `json:"regions"`
	Chunks      int   `json:"chunks"`
	Collapsed   int   `json:"collapsed"`
	AlreadyHuge int   `json:"alreadyHuge"`
	Skipped     int   `json:"skipped"`
	ElapsedMs   int64 `json:"elapsedMs"`
}

const hugePage = 2 << 20

// Collapse asks the kernel to put the agent's own anonymous memory into 2 MiB
// pages. What it will not take is skipped.
func Collapse() (Collapsed, error) {
	began := time.Now()
	var r Collapsed
	maps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return r, fmt.Errorf("read own memory map: %w", err)
	}
	var from, to uintptr
	eligible := false
	for line := range strings.SplitSeq(string(maps), "\n") {
		var perms, offset, device string
		var inode uint64
		if n, _ := fmt.Sscanf(line, "%x-%x %s %s %s %d", &from, &to, &perms, &offset, &device, &inode); n == 6 {
			eligible = strings.HasPrefix(perms, "rw") && inode == 0 && !strings.HasSuffix(line, "]")
			continue
		}
		// One line a region tells how much of it is in huge pages already.
		var huge int64
		if n, _ := fmt.Sscanf(line, "AnonHugePages: %d kB", &huge); n != 1 || !eligible {
			continue
		}
		r.Regions++
		r.collapse((from+hugePage-1)&^(hugePage-1), to, int(huge>>11))
	}
	r.ElapsedMs = time.Since(began).Milliseconds()
	return r, nil
}

func (r *Collapsed) collapse(from, to uintptr, already int) {
	took := 0
	for at := from; at+hugePage <= to; at += hugePage {
		r.Chunks++
		if _, _, e := unix.Syscall(unix.SYS_MADVISE, at, hugePage, unix.MADV_COLLAPSE); e != 0 {
			r.Skipped++
			continue
		}
		took++
	}
	already = min(already, took)
	r.AlreadyHuge += already
	r.Collapsed += took - already
}
