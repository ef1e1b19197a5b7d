package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const kernelFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

func mountKernel(at, kind string) error {
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	err := unix.Mount(kind, at, kind, kernelFlags, "")
	if errors.Is(err, unix.EBUSY) {
		return nil // there already
	}
	return err
}

// mountFirst gives the initramfs what the next steps need; /proc is there since Wanted.
func mountFirst() error {
	if err := mountKernel("/sys", "sysfs"); err != nil {
		return fmt.Errorf("/sys: %w", err)
	}
	err := unix.Mount("devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755")
	if err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("/dev: %w", err)
	}
	return nil
}

// mounts are what programs expect below the new root, in order. /tmp stays on
// the disk: it counts as the sandbox's and is saved with it.
var mounts = []struct {
	at, kind, data string
	flags          uintptr
	optional       bool
}{
	{at: "proc", kind: "proc", flags: kernelFlags},
	{at: "sys", kind: "sysfs", flags: kernelFlags},
	{at: "sys/fs/cgroup", kind: "cgroup2", flags: kernelFlags, data: "nsdelegate"},
	{at: "dev", kind: "devtmpfs", flags: unix.MS_NOSUID, data: "mode=0755"},
	{at: "dev/pts", kind: "devpts", flags: unix.MS_NOSUID | unix.MS_NOEXEC, data: "mode=0620,gid=5,ptmxmode=0666"},
	{at: "dev/shm", kind: "tmpfs", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=1777"},
	{at: "dev/mqueue", kind: "mqueue", flags: kernelFlags, optional: true},
	{at: "run", kind: "tmpfs", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=0755"},
}

var links = map[string]string{
	"dev/fd": "/proc/self/fd", "dev/stdin": "/proc/self/fd/0",
	"dev/stdout": "/proc/self/fd/1", "dev/stderr": "/proc/self/fd/2",
}

func mountAll() error {
	for _, m := range mounts {
		at := filepath.Join(newRoot, m.at)
		if err := os.MkdirAll(at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, at, m.kind, m.flags, m.data); err != nil && !m.optional {
			return fmt.Errorf("/%s: %w", m.at, err)
		}
	}
	for at, to := range links {
		if err := os.Symlink(to, filepath.Join(newRoot, at)); err != nil && !os.IsExist(err) {
			return err
		}
	}
	tmp := filepath.Join(newRoot, "tmp")
	if err := os.Mkdir(tmp, 0o777); err == nil {
		return os.Chmod(tmp, 0o777|os.ModeSticky)
	}
	return nil
}
