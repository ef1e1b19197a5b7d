package host

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// _IOWR('X', 119, int) and _IOWR('X', 120, int), linux/fs.h.
const (
	fifreeze = 0xC0045877
	fithaw   = 0xC0045878
)

// FreezeDisk flushes the file system of an open directory (the root when fd is negative) and holds its writers. A frozen
// one stays frozen without error. Freezing flushes, too, but while writers wait: most of it is done before.
func FreezeDisk(fd int) error {
	return onDisk(fd, func(fd int) error {
		if err := unix.Syncfs(fd); err != nil {
			return fmt.Errorf("flush the disk: %w", err)
		}
		if err := unix.IoctlSetInt(fd, fifreeze, 0); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("freeze the disk: %w", err)
		}
		return nil
	})
}

// ThawDisk lets writers go on. One that is not frozen stays so without error.
func ThawDisk(fd int) error {
	return onDisk(fd, func(fd int) error {
		if err := unix.IoctlSetInt(fd, fithaw, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("thaw the disk: %w", err)
		}
		return nil
	})
}

func onDisk(fd int, do func(fd int) error) error {
	if fd < 0 {
		root, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(root) }()
		fd = root
	}
	return do(fd)
}
