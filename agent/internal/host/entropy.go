package host

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// AddEntropy credits seed to the kernel's random pool and reseeds its
// generator, so that clones of one memory snapshot part ways at once.
func AddEntropy(seed []byte) error {
	if len(seed) == 0 {
		return nil
	}
	fd, err := unix.Open("/dev/urandom", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/urandom: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	// struct rand_pool_info { int entropy_count /* bits */; int buf_size; __u32 buf[]; }
	info := make([]byte, 8+len(seed))
	binary.NativeEndian.PutUint32(info[0:], uint32(len(seed)*8))
	binary.NativeEndian.PutUint32(info[4:], uint32(len(seed)))
	copy(info[8:], seed)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info[0]))); e != 0 {
		if allowed(e) != nil {
			return fmt.Errorf("add entropy: %w", e)
		}
		// Not privileged: mixing it in without credit still helps.
		_, _ = unix.Write(fd, seed)
		return nil
	}
	// RNDRESEEDCRNG makes the generator take the new state now instead of within a minute.
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDRESEEDCRNG, 0); e != 0 && allowed(e) != nil && e != unix.EINVAL {
		return fmt.Errorf("reseed: %w", e)
	}
	return nil
}
