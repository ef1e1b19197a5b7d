package boot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// diskPatience is how long a disk may take to appear after its driver was loaded.
const diskPatience = 5 * time.Second

// joinDisks mounts the layers and the upper and joins them at newRoot. It
// returns an open directory of the upper's file system.
func joinDisks(layers int) (int, error) {
	var lower []string
	for i := range layers {
		at, kind, err := mountDisk(i, unix.MS_RDONLY)
		if err != nil {
			return -1, fmt.Errorf("layer %d: %w", i+1, err)
		}
		if kind == "ext4" { // the upper of a build's machine, with overlayfs's own folder beside the files
			at = filepath.Join(at, "u")
		}
		lower = append([]string{at}, lower...) // overlayfs names the topmost first
	}
	upper, _, err := mountDisk(layers, 0)
	if err != nil {
		return -1, fmt.Errorf("upper: %w", err)
	}
	for _, dir := range []string{"u", "w"} {
		if err := os.Mkdir(filepath.Join(upper, dir), 0o755); err != nil && !os.IsExist(err) {
			return -1, fmt.Errorf("upper: %w", err)
		}
	}
	joined := "lowerdir=" + strings.Join(lower, ":") + ",upperdir=" + upper + "/u,workdir=" + upper + "/w"
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return -1, err
	}
	if err := unix.Mount("overlay", newRoot, "overlay", unix.MS_NOATIME, joined); err != nil {
		return -1, fmt.Errorf("overlay: %w", err)
	}
	return unix.Open(upper, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

// mountDisk mounts the n-th virtio disk (0 is /dev/vda) and returns where, and
// its file system.
func mountDisk(n int, flags uintptr) (at, kind string, err error) {
	device := "/dev/vd" + string(rune('a'+n))
	if err := await(device); err != nil {
		return "", "", err
	}
	kind, err = kindOf(device)
	if err != nil {
		return "", "", fmt.Errorf("%s: %w", device, err)
	}
	at = filepath.Join(disks, strconv.Itoa(n))
	if err := os.MkdirAll(at, 0o755); err != nil {
		return "", "", err
	}
	flags |= unix.MS_NOATIME
	var options string
	if kind == "ext4" && flags&unix.MS_RDONLY == 0 {
		// Else the kernel writes zeros over unused inode tables in the background: megabytes in each disk and memory.
		options = "noinit_itable,errors=remount-ro"
	}
	err = unix.Mount(device, at, kind, flags, options)
	if kind == "ext4" && flags&unix.MS_RDONLY != 0 && err != nil {
		// What a guest wrote and never unmounted has a journal to replay, which a read-only disk cannot.
		err = unix.Mount(device, at, kind, flags, "noload")
	}
	if err != nil {
		return "", "", fmt.Errorf("mount %s (%s): %w", device, kind, err)
	}
	return at, kind, nil
}

func await(device string) error {
	for began := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		_, err := os.Stat(device)
		if err == nil {
			return nil
		}
		if time.Since(began) > diskPatience {
			return fmt.Errorf("the disk did not appear: %w", err)
		}
	}
}

// errUnknownDisk says that a disk holds no file system we mount.
var errUnknownDisk = errors.New("neither erofs nor ext4")

// kindOf tells the file system by its magic number: erofs has its superblock at
// 1024, ext4 its magic at 1024 + 56.
func kindOf(device string) (string, error) {
	file, err := os.Open(device)
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	block := make([]byte, 64)
	if _, err := file.ReadAt(block, 1024); err != nil {
		return "", err
	}
	switch {
	case binary.LittleEndian.Uint32(block) == unix.EROFS_SUPER_MAGIC_V1:
		return "erofs", nil
	case binary.LittleEndian.Uint16(block[56:]) == unix.EXT4_SUPER_MAGIC:
		return "ext4", nil
	}
	return "", errUnknownDisk
}
