package host

import (
	"fmt"
	"os"
	"strconv"
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
	var from, to uint64
	eligible := false
	for line := range strings.SplitSeq(string(maps), "\n") {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		if a, b, ok := bounds(f[0]); ok && len(f) >= 5 {
			// from-to perms offset device inode [name]
			from, to = a, b
			eligible = strings.HasPrefix(f[1], "rw") && f[4] == "0" && !strings.HasSuffix(line, "]")
			continue
		}
		// One line a region tells how much of it is in huge pages already.
		if f[0] != "AnonHugePages:" || !eligible {
			continue
		}
		huge, err := strconv.Atoi(f[1])
		if err != nil {
			continue
		}
		r.Regions++
		r.collapse((from+hugePage-1)&^uint64(hugePage-1), to, huge>>11)
	}
	r.ElapsedMs = time.Since(began).Milliseconds()
	return r, nil
}

func bounds(text string) (from, to uint64, ok bool) {
	a, b, found := strings.Cut(text, "-")
	from, err1 := strconv.ParseUint(a, 16, 64)
	to, err2 := strconv.ParseUint(b, 16, 64)
	return from, to, found && err1 == nil && err2 == nil && from < to
}

func (r *Collapsed) collapse(from, to uint64, already int) {
	took := 0
	for at := from; at+hugePage <= to; at += hugePage {
		r.Chunks++
		if _, _, e := unix.Syscall(unix.SYS_MADVISE, uintptr(at), hugePage, unix.MADV_COLLAPSE); e != 0 {
			r.Skipped++
			continue
		}
		took++
	}
	already = min(already, took)
	r.AlreadyHuge += already
	r.Collapsed += took - already
}
