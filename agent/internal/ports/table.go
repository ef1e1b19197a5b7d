package ports

import (
	"bufio"
	"encoding/hex"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// listProc returns the listening TCP sockets that /proc/net shows, for kernels
// without NETLINK_SOCK_DIAG (gVisor).
func listProc() ([]netip.AddrPort, error) {
	found, err := readTable("/proc/net/tcp")
	if err != nil {
		return nil, err
	}
	six, err := readTable("/proc/net/tcp6")
	if err != nil {
		return found, nil // a machine without IPv6 has no tcp6
	}
	return append(found, six...), nil
}

// readTable reads one table. The kernel lists listeners before connections, so
// reading stops at the first other line.
func readTable(path string) ([]netip.AddrPort, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	var found []netip.AddrPort
	lines := bufio.NewScanner(file)
	lines.Scan() // the heading
	for lines.Scan() {
		// sl local_address rem_address st ...
		f := strings.Fields(lines.Text())
		if len(f) < 4 || f[3] != stateListen {
			break
		}
		if at, ok := parse(f[1]); ok {
			found = append(found, at)
		}
	}
	return found, lines.Err()
}

const stateListen = "0A"

// parse reads `0100007F:1F90`: the address is 32-bit words in host (little-endian) order.
func parse(text string) (netip.AddrPort, bool) {
	addr, port, ok := strings.Cut(text, ":")
	if !ok {
		return netip.AddrPort{}, false
	}
	raw, err := hex.DecodeString(addr)
	if err != nil || len(raw)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(raw); i += 4 {
		raw[i], raw[i+1], raw[i+2], raw[i+3] = raw[i+3], raw[i+2], raw[i+1], raw[i]
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	ip, ok := netip.AddrFromSlice(raw)
	if !ok {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(n)), true
}
