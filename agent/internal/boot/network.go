package boot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

const iface = "eth0"

// setUpNetwork brings loopback and eth0 up, by the ioctls that every kernel has.
func setUpNetwork(o options) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := linkUp(fd, "lo"); err != nil {
		return err
	}
	if o.address.IsValid() {
		if err := setAddress(fd, unix.SIOCSIFADDR, o.address.Addr()); err != nil {
			return fmt.Errorf("address of %s: %w", iface, err)
		}
		if err := setAddress(fd, unix.SIOCSIFNETMASK, netmask(o.address.Bits())); err != nil {
			return fmt.Errorf("netmask of %s: %w", iface, err)
		}
		if err := linkUp(fd, iface); err != nil {
			return err
		}
	}
	if o.gateway.IsValid() {
		if err := addDefaultRoute(fd, o.gateway); err != nil {
			return fmt.Errorf("default route by %s: %w", o.gateway, err)
		}
	}
	if len(o.dns) > 0 {
		return writeResolvers(o.dns)
	}
	return nil
}

func linkUp(fd int, name string) error {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring up %s: %w", name, err)
	}
	return nil
}

func setAddress(fd int, what uint, addr netip.Addr) error {
	req, err := unix.NewIfreq(iface)
	if err != nil {
		return err
	}
	if err := req.SetInet4Addr(addr.AsSlice()); err != nil {
		return err
	}
	return unix.IoctlIfreq(fd, what, req)
}

func netmask(bits int) netip.Addr {
	var mask [4]byte
	binary.BigEndian.PutUint32(mask[:], ^uint32(0)<<(32-bits))
	return netip.AddrFrom4(mask)
}

// rtentry is struct rtentry of linux/route.h.
type rtentry struct {
	_       uintptr
	dst     unix.RawSockaddrInet4
	gateway unix.RawSockaddrInet4
	genmask unix.RawSockaddrInet4
	flags   uint16
	_       int16
	_       uintptr
	_       uintptr
	metric  int16
	dev     *byte
	mtu     uintptr
	window  uintptr
	irtt    uint16
}

func addDefaultRoute(fd int, gateway netip.Addr) error {
	any := unix.RawSockaddrInet4{Family: unix.AF_INET}
	route := rtentry{dst: any, gateway: any, genmask: any, flags: unix.RTF_UP | unix.RTF_GATEWAY}
	route.gateway.Addr = gateway.As4()
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(&route)))
	if e != 0 && e != unix.EEXIST {
		return e
	}
	return nil
}

func writeResolvers(servers []netip.Addr) error {
	const path = "/etc/resolv.conf"
	var text strings.Builder
	for _, s := range servers {
		text.WriteString("nameserver " + s.String() + "\n")
	}
	// An image may have a link here, to a resolver that does not run.
	if info, err := os.Lstat(path); err == nil && !info.Mode().IsRegular() {
		if err := os.Remove(path); err != nil {
			return err
		}
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll("/etc", 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text.String()), 0o644)
}
