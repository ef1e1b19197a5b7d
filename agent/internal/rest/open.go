package rest

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// openSafely opens path for the calling thread's user. Two things of emberd's
// own must stay out of reach even of root, who may read every file: what its
// /proc directory shows (memory, environment) and its open descriptors.
// RESOLVE_NO_MAGICLINKS shuts the second, a look at where the descriptor came
// from the first.
func openSafely(path string, flags int, perm uint32) (int, error) {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NOCTTY),
		Mode:    uint64(perm),
		Resolve: unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ENOSYS) {
		fd, err = unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOCTTY, perm)
	}
	if err != nil {
		return -1, err
	}
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil && fs.Type == unix.PROC_SUPER_MAGIC && isOwnProc(fd) {
		_ = unix.Close(fd)
		return -1, unix.EACCES
	}
	return fd, nil
}

// isOwnProc says whether fd is below /proc/<emberd or one of its threads>.
func isOwnProc(fd int) bool {
	path, err := os.Readlink("/proc/thread-self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return true // cannot tell: refuse
	}
	for part := range strings.SplitSeq(path, "/") {
		if id, err := strconv.Atoi(part); err == nil {
			if unix.Access("/proc/self/task/"+strconv.Itoa(id), unix.F_OK) == nil {
				return true
			}
		}
	}
	return false
}
