// Package transfer moves trees where a rename cannot: it copies, then removes.
// Its functions touch files: call them as the asked user (see asuser).
package transfer

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Move copies from to to and removes from. The copy is made under another name
// beside to and renamed when it is whole, so that a failure leaves both as they were.
//
// Kernel file systems are refused: their "files" are views of the kernel, and
// /proc/self would be the agent.
func Move(from, to string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(from), &fs); err != nil {
		return err
	}
	if fs.Type == unix.PROC_SUPER_MAGIC || fs.Type == unix.SYSFS_MAGIC {
		return &os.PathError{Op: "move", Path: from, Err: unix.EACCES}
	}
	part := filepath.Join(filepath.Dir(to), ".moving-"+rand.Text())
	if err := copyTree(from, part); err != nil {
		_ = os.RemoveAll(part)
		return err
	}
	if err := os.Rename(part, to); err != nil {
		_ = os.RemoveAll(part)
		return err
	}
	return os.RemoveAll(from)
}

func copyTree(from, to string) error {
	info, err := os.Lstat(from)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: no stat", from)
	}
	switch info.Mode().Type() {
	case 0:
		err = copyFile(from, to, info)
	case os.ModeDir:
		err = copyDir(from, to)
	case os.ModeSymlink:
		var text string
		if text, err = os.Readlink(from); err == nil {
			err = os.Symlink(text, to)
		}
	default:
		err = unix.Mknod(to, st.Mode, int(st.Rdev))
	}
	if err != nil {
		return err
	}
	return copyAttributes(from, to, info, st)
}

func copyFile(from, to string, info os.FileInfo) error {
	in, err := os.OpenFile(from, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm()|0o200)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil { // copy_file_range where the kernel can
		_ = out.Close()
		return err
	}
	return out.Close()
}

func copyDir(from, to string) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := copyTree(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// copyAttributes keeps owner, mode, xattrs and times. A user cannot give files
// away: the owner is kept where allowed, as mv does.
func copyAttributes(from, to string, info os.FileInfo, st *syscall.Stat_t) error {
	owned := os.Lchown(to, int(st.Uid), int(st.Gid)) == nil
	if info.Mode()&os.ModeSymlink == 0 {
		mode := st.Mode & 0o7777
		if !owned {
			mode &^= unix.S_ISUID | unix.S_ISGID
		}
		if err := unix.Fchmodat(unix.AT_FDCWD, to, mode, 0); err != nil {
			return err
		}
		if err := copyXattrs(from, to); err != nil {
			return err
		}
	}
	times := []unix.Timespec{{Sec: st.Atim.Sec, Nsec: st.Atim.Nsec}, {Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}}
	return unix.UtimesNanoAt(unix.AT_FDCWD, to, times, unix.AT_SYMLINK_NOFOLLOW)
}

func copyXattrs(from, to string) error {
	size, err := unix.Llistxattr(from, nil)
	if err != nil || size == 0 {
		return nil // none, or a file system without
	}
	names := make([]byte, size)
	if size, err = unix.Llistxattr(from, names); err != nil {
		return nil
	}
	value := make([]byte, 64<<10)
	for start, at := 0, 0; at < size; at++ {
		if names[at] != 0 {
			continue
		}
		name := string(names[start:at])
		start = at + 1
		n, err := unix.Lgetxattr(from, name, value)
		if err != nil {
			continue
		}
		err = unix.Lsetxattr(to, name, value[:n], 0)
		if err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("copy attribute %s: %w", name, err)
		}
	}
	return nil
}
