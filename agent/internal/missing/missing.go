// Package missing creates what is not there, where the asked user may not:
// `/app`, or a file in `/srv`. Clients expect that of an upload and of a new
// directory, and both to be the user's.
//
// This opens nothing to the caller: who has the sandbox's token and asks for
// user="user" may ask for user="root". What must not happen is that a process inside the machine turns
// the agent's right to an entry that the caller did not name. Therefore:
//
//   - It is tried only after the user itself was refused (EACCES, EPERM).
//   - Every lookup is made as the user, from "/" on, one name at a time, without
//     following a symlink and without leaving the root's mount. A directory that
//     the user may not search stays closed; /proc, /sys, /dev and /run/e2b are
//     closed by name as well, as an image may have them on its root.
//   - The right that the user lacks is lent to two calls, each on an open
//     directory and one name in it: mkdirat, and open with O_CREAT|O_EXCL. Neither
//     can reach anything that exists. They run with the user's ids, so that what
//     they make is the user's from its first moment; nothing is ever chowned.
//   - A kernel without openat2 has none of this.
package missing

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/users"
)

// closed are directories below which nothing is made, whatever is mounted there.
var closed = []string{"/proc", "/sys", "/dev", "/run/e2b"}

const (
	dirMode  = 0o755
	fileMode = 0o666
	resolve  = unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV | unix.RESOLVE_BENEATH
)

// Dirs makes the directory path and its missing parents for u, after refusal,
// which is what the user's own attempt returned. path is absolute and clean.
//
// Errors: refusal where it is no refusal, or where the rules above forbid more;
// ENOSPC or EDQUOT.
func Dirs(u *users.User, path string, refusal error) error {
	if !mayMend(u, path, refusal) {
		return refusal
	}
	dir, err := open(u, path)
	if err != nil {
		return explain(err, refusal)
	}
	return unix.Close(dir)
}

// File makes the regular file path and its missing parents for u, after
// refusal, and returns it open for writing. Errors are those of Dirs.
func File(u *users.User, path string, refusal error) (int, error) {
	if !mayMend(u, path, refusal) {
		return -1, refusal
	}
	fd, err := create(u, path)
	if err != nil {
		return -1, explain(err, refusal)
	}
	return fd, nil
}

// Remove removes path if it still names the file that fd has open, after the
// user itself was refused. It undoes File; errors are those of Dirs.
func Remove(u *users.User, path string, fd int, refusal error) error {
	if !mayMend(u, path, refusal) {
		return refusal
	}
	parent, name := split(path)
	dir, err := open(u, parent)
	if err != nil {
		return explain(err, refusal)
	}
	defer func() { _ = unix.Close(dir) }()
	var opened, named unix.Stat_t
	if err := unix.Fstat(fd, &opened); err != nil {
		return refusal
	}
	err = asuser.Do(u, func() error { return unix.Fstatat(dir, name, &named, unix.AT_SYMLINK_NOFOLLOW) })
	if err != nil || opened.Dev != named.Dev || opened.Ino != named.Ino {
		return explain(err, refusal)
	}
	// Who exchanges the name now has the right to remove in this directory, and so needs no help of ours.
	return asuser.Overriding(u, func() error { return unix.Unlinkat(dir, name, 0) })
}

// mayMend says whether a lent right is of use and allowed at path.
func mayMend(u *users.User, path string, refusal error) bool {
	if !errors.Is(refusal, unix.EACCES) && !errors.Is(refusal, unix.EPERM) {
		return false
	}
	for _, c := range closed {
		if path == c || strings.HasPrefix(path, c+"/") {
			return false
		}
	}
	return u.UID != 0 // modes do not bind root: something else refused
}

// explain picks what to tell: the user's own refusal says more than, say, ELOOP.
func explain(err, refusal error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return err
	}
	return refusal
}

func create(u *users.User, path string) (int, error) {
	parent, name := split(path)
	dir, err := open(u, parent)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(dir) }()
	if err := absent(u, dir, name); err != nil {
		return -1, err
	}
	fd := -1
	err = asuser.Overriding(u, func() (err error) {
		fd, err = unix.Openat2(dir, name, &unix.OpenHow{
			Flags:   unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NOCTTY,
			Mode:    fileMode,
			Resolve: resolve,
		})
		return err
	})
	return fd, err
}

// absent looks name up as u: nil when it is not there and u may know that.
func absent(u *users.User, dir int, name string) error {
	var st unix.Stat_t
	err := asuser.Do(u, func() error { return unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) })
	switch {
	case err == nil:
		return unix.EEXIST
	case errors.Is(err, unix.ENOENT):
		return nil
	}
	return err
}

// open opens the directory path, making what is missing of it.
func open(u *users.User, path string) (int, error) {
	dir, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	for name := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		if name == "" {
			continue // the path is "/"
		}
		next, err := enter(u, dir, name)
		if errors.Is(err, unix.ENOENT) {
			next, err = makeAndEnter(u, dir, name)
		}
		_ = unix.Close(dir)
		if err != nil {
			return -1, err
		}
		dir = next
	}
	return dir, nil
}

// enter opens a directory in dir with u's own rights.
func enter(u *users.User, dir int, name string) (int, error) {
	return asuser.Get(u, func() (int, error) {
		return unix.Openat2(dir, name, &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Resolve: resolve,
		})
	})
}

func makeAndEnter(u *users.User, dir int, name string) (int, error) {
	err := asuser.Overriding(u, func() error { return unix.Mkdirat(dir, name, dirMode) })
	if err != nil && !errors.Is(err, unix.EEXIST) { // another upload was quicker
		return -1, err
	}
	return enter(u, dir, name)
}

func split(path string) (parent, name string) {
	at := strings.LastIndexByte(path, '/')
	return path[:at], path[at+1:]
}
