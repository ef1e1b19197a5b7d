// Package ports makes what user programs bind to loopback alone reachable at
// the machine's own address, where the edge calls.
//
// How: while there are programs, the kernel is asked for its listeners every
// pollEvery (see diag; a look costs some tens of microseconds), and for a port
// that listens on loopback only, the agent listens on the machine's address
// and splices both ways.
//
// The trade-off: while the agent holds `address:port`, a program that wants
// `0.0.0.0:port` gets "address in use" until the loopback listener is gone and
// the next look has seen it. A port is therefore given up at the first refused
// connection, and at the next look at the latest. Redirecting in the packet
// filter would hold no port, but needs rights and modules that a container
// does not have.
package ports

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"

	"emberbox/agent/internal/logs"
)

const (
	pollEvery = 400 * time.Millisecond
	// Reading /proc/net costs milliseconds on a big host: where it must do, it is done less often.
	pollProcEvery = 800 * time.Millisecond
	dialTimeout   = 5 * time.Second
	away          = 5 * time.Second
)

// Forwarder owns the agent's listeners for user ports.
type Forwarder struct {
	log *logs.Log
	own uint16 // the agent's port, never forwarded

	addresses func() []netip.Addr // replaced in tests

	mu   sync.Mutex
	open map[uint16]*forward
}

// New returns a forwarder that leaves the agent's own port alone.
func New(own uint16, log *logs.Log) *Forwarder {
	return &Forwarder{log: log, own: own, open: map[uint16]*forward{}, addresses: machineAddresses}
}

// Programs are those whose ports are forwarded.
type Programs interface {
	Alone() bool             // there is none
	Forked() <-chan struct{} // one was started
}

// Run forwards until the context ends.
func (f *Forwarder) Run(ctx context.Context, programs Programs) {
	list, every := listProc, pollProcEvery
	if d, err := openDiag(); err == nil {
		defer d.close()
		if _, err := d.list(); err == nil {
			list, every = d.list, pollEvery
		}
	}
	f.follow(ctx, programs, list, every)
}

// follow looks every so often while there are programs.
func (f *Forwarder) follow(
	ctx context.Context, programs Programs, list func() ([]netip.AddrPort, error), every time.Duration,
) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	defer f.update(nil)
	for at := time.Now(); ; {
		last := at
		at = time.Now()
		alone, known := programs.Alone(), false
		// A machine that slept longer than it should was paused or saved: what wakes it goes first.
		if at.Sub(last) < away {
			if found, err := list(); err == nil {
				f.look(found)
				known = true
			}
		}
		if alone && known {
			// Nothing can listen until a program is started, and an idle machine is left in peace.
			select {
			case <-programs.Forked():
				tick.Reset(every)
				at = time.Now()
			case <-ctx.Done():
				return
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// look brings the forwards in line with what listens now.
func (f *Forwarder) look(found []netip.AddrPort) {
	if f.idle(found) {
		return
	}
	loopback := map[uint16]netip.AddrPort{}
	elsewhere := map[uint16]bool{}
	for _, at := range found {
		if !at.Addr().IsLoopback() {
			if !f.isOurs(at) {
				elsewhere[at.Port()] = true
			}
			continue
		}
		if known, ok := loopback[at.Port()]; !ok || known.Addr().Is6() {
			loopback[at.Port()] = at
		}
	}
	delete(loopback, f.own)
	for port := range elsewhere {
		delete(loopback, port)
	}
	f.update(loopback)
}

// idle says that nothing is forwarded or to be forwarded; most machines, most of the time.
func (f *Forwarder) idle(found []netip.AddrPort) bool {
	for _, at := range found {
		if at.Addr().IsLoopback() && at.Port() != f.own {
			return false
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.open) == 0
}

// isOurs says whether a listener is one of the forwarder's own.
func (f *Forwarder) isOurs(at netip.AddrPort) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	fw := f.open[at.Port()]
	return fw != nil && fw.listens(at.Addr())
}

func (f *Forwarder) update(wanted map[uint16]netip.AddrPort) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for port, fw := range f.open {
		if target, keep := wanted[port]; !keep || target != fw.target || fw.refused() {
			fw.stopListening()
			delete(f.open, port)
		}
	}
	var addresses []netip.Addr
	for port, target := range wanted {
		if f.open[port] != nil {
			continue
		}
		if addresses == nil {
			addresses = f.addresses()
		}
		if fw := listen(addresses, target); fw != nil {
			f.open[port] = fw
			f.log.Info("ports", "forwarding", "port", strconv.Itoa(int(port)), "target", target.String())
		}
	}
}

// machineAddresses are the IPv4 addresses of the machine's interfaces, without loopback.
func machineAddresses() []netip.Addr {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var found []netip.Addr
	for _, a := range all {
		if ipNet, ok := a.(*net.IPNet); ok {
			ip, _ := netip.AddrFromSlice(ipNet.IP)
			if ip = ip.Unmap(); ip.Is4() && ip.IsGlobalUnicast() || ip.Is4() && ip.IsLinkLocalUnicast() {
				found = append(found, ip)
			}
		}
	}
	return found
}

// forward is one user port with its listeners and connections.
type forward struct {
	target    netip.AddrPort
	listeners []net.Listener

	mu   sync.Mutex
	shut bool
}

func listen(addresses []netip.Addr, target netip.AddrPort) *forward {
	fw := &forward{target: target}
	for _, a := range addresses {
		l, err := net.Listen("tcp4", netip.AddrPortFrom(a, target.Port()).String())
		if err != nil {
			continue // someone else has it: then it is reachable already
		}
		fw.listeners = append(fw.listeners, l)
		go fw.accept(l)
	}
	if fw.listeners == nil {
		return nil
	}
	return fw
}

func (fw *forward) listens(a netip.Addr) bool {
	for _, l := range fw.listeners {
		if at, ok := l.Addr().(*net.TCPAddr); ok && at.AddrPort().Addr().Unmap() == a {
			return true
		}
	}
	return false
}

func (fw *forward) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors, most likely
			continue
		}
		go fw.serve(conn)
	}
}

func (fw *forward) serve(from net.Conn) {
	defer func() { _ = from.Close() }()
	to, err := net.DialTimeout("tcp", fw.target.String(), dialTimeout)
	if err != nil {
		if errors.Is(err, syscall.ECONNREFUSED) {
			fw.stopListening()
		}
		return
	}
	defer func() { _ = to.Close() }()
	done := make(chan struct{})
	go func() {
		pass(to, from)
		close(done)
	}()
	pass(from, to)
	<-done
}

// pass copies one way (by splice) and passes the end on.
func pass(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if err != nil {
		_ = to.Close()
		_ = from.Close()
		return
	}
	if half, ok := to.(*net.TCPConn); ok {
		_ = half.CloseWrite()
	}
}

// stopListening frees the port at once. Connections that exist go on: a server
// that stopped listening may still serve those it has.
func (fw *forward) stopListening() {
	fw.mu.Lock()
	defer fw.mu.Unlock()
	if fw.shut {
		return
	}
	fw.shut = true
	for _, l := range fw.listeners {
		_ = l.Close()
	}
}

func (fw *forward) refused() bool {
	fw.mu.Lock()
	defer fw.mu.Unlock()
	return fw.shut
}
