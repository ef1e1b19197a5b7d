package ports

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// diag asks the kernel for listening sockets over NETLINK_SOCK_DIAG. Unlike
// /proc/net/tcp, which walks the hash table of all connections of the host
// (milliseconds on a big one, whatever this machine has), it visits listeners only.
//
// It is asked for ever, and so allocates nothing: garbage of an idle machine
// would be collected, and each collection touches memory that was at rest.
type diag struct {
	fd      int
	request [requestSize]byte
	answer  []byte
	found   []netip.AddrPort
}

const (
	sockDiagByFamily = 20 // linux/sock_diag.h
	tcpListen        = 10 // TCP_LISTEN
	headerSize       = 16 // struct nlmsghdr
	requestSize      = headerSize + 56
	messageSize      = 72 // struct inet_diag_msg
)

func openDiag() (*diag, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	// Connected, so that plain read and write do.
	if err := unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	// A dump is answered at once; the limit guards against a kernel that never ends one.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return &diag{fd: fd, answer: make([]byte, 16<<10)}, nil
}

func (d *diag) close() { _ = unix.Close(d.fd) }

// list returns the listening TCP sockets of both families, until the next call.
func (d *diag) list() ([]netip.AddrPort, error) {
	d.found = d.found[:0]
	if err := d.listeners(unix.AF_INET); err != nil {
		return nil, err
	}
	_ = d.listeners(unix.AF_INET6) // fails in a machine without IPv6
	return d.found, nil
}

// listeners appends the listening TCP sockets of one address family to found.
func (d *diag) listeners(family uint8) error {
	req := d.request[:]
	binary.NativeEndian.PutUint32(req[0:], requestSize)
	binary.NativeEndian.PutUint16(req[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req[headerSize] = family
	req[headerSize+1] = unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(req[headerSize+4:], 1<<tcpListen)
	if _, err := unix.Write(d.fd, req); err != nil {
		return err
	}
	for {
		n, err := unix.Read(d.fd, d.answer)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		more, err := parseDump(d.answer[:n], &d.found)
		if err != nil || !more {
			return err
		}
	}
}

// parseDump reads one datagram of a dump and says whether more will come.
func parseDump(buf []byte, found *[]netip.AddrPort) (bool, error) {
	for len(buf) >= headerSize {
		size := int(binary.NativeEndian.Uint32(buf))
		if size < headerSize || size > len(buf) {
			return false, fmt.Errorf("malformed netlink message of %d bytes", size)
		}
		body := buf[headerSize:size]
		switch binary.NativeEndian.Uint16(buf[4:]) {
		case unix.NLMSG_DONE:
			return false, nil
		case unix.NLMSG_ERROR:
			if len(body) >= 4 {
				if errno := -int32(binary.NativeEndian.Uint32(body)); errno != 0 {
					return false, unix.Errno(errno)
				}
			}
			return false, nil
		case sockDiagByFamily:
			if len(body) < messageSize {
				return false, errors.New("short inet_diag message")
			}
			// family, state, timer, retrans; then sport, dport (big-endian), src[16], ...
			port := binary.BigEndian.Uint16(body[4:])
			ip := netip.AddrFrom16([16]byte(body[8:24])).Unmap()
			if body[0] == unix.AF_INET {
				ip = netip.AddrFrom4([4]byte(body[8:12]))
			}
			*found = append(*found, netip.AddrPortFrom(ip, port))
		}
		buf = buf[min(len(buf), (size+3)&^3):]
	}
	return true, nil
}
