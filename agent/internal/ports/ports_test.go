package ports

import (
	"context"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"emberbox/agent/internal/logs"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		"0100007F:1F90":                         "127.0.0.1:8080",
		"00000000:0050":                         "0.0.0.0:80",
		"00000000000000000000000001000000:1F90": "[::1]:8080",
		"0000000000000000FFFF00000100007F:1F90": "127.0.0.1:8080",
		"00000000000000000000000000000000:0016": "[::]:22",
	} {
		if got, ok := parse(text); !ok || got.String() != want {
			t.Errorf("parse(%q) = %v, %v; want %s", text, got, ok, want)
		}
	}
	for _, text := range []string{"", ":", "0100007F", "zz:1", "0100007F:zz", "01:1"} {
		if got, ok := parse(text); ok {
			t.Errorf("parse(%q) = %v", text, got)
		}
	}
}

func TestBothTablesShowAListener(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	at := l.Addr().(*net.TCPAddr).AddrPort()

	proc, err := listProc()
	if err != nil || !slices.Contains(proc, at) {
		t.Errorf("/proc: %v, %v", proc, err)
	}
	d, err := openDiag()
	if err != nil {
		t.Skipf("no NETLINK_SOCK_DIAG here: %v", err)
	}
	defer d.close()
	found, err := d.list()
	if err != nil || !slices.Contains(found, at) {
		t.Errorf("netlink: %v, %v", found, err)
	}
}

func FuzzParseDump(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, 200))
	f.Add([]byte{16, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(_ *testing.T, data []byte) {
		var found []netip.AddrPort
		_, _ = parseDump(data, &found)
	})
}

// The "machine's address" of this test is 127.0.0.2.
func TestALoopbackPortIsForwardedAndGivenUp(t *testing.T) {
	server, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := server.Addr().(*net.TCPAddr).AddrPort()
	go func() {
		for {
			c, err := server.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
	outside := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), target.Port())
	f := New(1, logs.New(nil, "debug"))
	f.addresses = func() []netip.Addr { return []netip.Addr{outside.Addr()} }

	f.look([]netip.AddrPort{target})
	answer := ask(t, outside, "echo")
	// The forwarder's own listener must not count as the program's.
	f.look([]netip.AddrPort{target, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), target.Port())})
	again := ask(t, outside, "echo")
	_ = server.Close()
	refused := ask(t, outside, "echo")

	if answer != "echo" || again != "echo" || refused != "" {
		t.Errorf("%q %q %q", answer, again, refused)
	}
	// Given up at the refused connection, before the next look.
	l, err := net.Listen("tcp4", outside.String())
	if err != nil {
		t.Fatalf("the port is still held: %v", err)
	}
	_ = l.Close()
}

func TestAPortThatListensElsewhereIsLeftAlone(t *testing.T) {
	f := New(7, logs.New(nil, "debug"))
	f.addresses = func() []netip.Addr { t.Error("asked for addresses"); return nil }

	f.look([]netip.AddrPort{
		netip.MustParseAddrPort("127.0.0.1:9"), netip.MustParseAddrPort("0.0.0.0:9"),
		netip.MustParseAddrPort("127.0.0.1:7"), netip.MustParseAddrPort("[::]:10"), netip.MustParseAddrPort("[::1]:10"),
	})

	if len(f.open) != 0 {
		t.Errorf("forwards %v", f.open)
	}
}

// told is what a test says of the programs in the machine.
type told struct {
	alone  atomic.Bool
	forked chan struct{}
}

func (p *told) Alone() bool             { return p.alone.Load() }
func (p *told) Forked() <-chan struct{} { return p.forked }

func TestAMachineWithoutProgramsIsLeftInPeace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		looks := 0
		list := func() ([]netip.AddrPort, error) { looks++; return nil, nil }
		programs := &told{forked: make(chan struct{}, 1)}
		programs.alone.Store(true)
		ctx, cancel := context.WithCancel(t.Context())
		go New(1, logs.New(nil, "debug")).follow(ctx, programs, list, 100*time.Millisecond)

		time.Sleep(time.Hour)
		idle := looks
		programs.alone.Store(false)
		programs.forked <- struct{}{}
		time.Sleep(1050 * time.Millisecond)
		busy := looks - idle
		programs.alone.Store(true)
		time.Sleep(time.Hour)
		after := looks - idle - busy
		cancel()
		synctest.Wait()

		if idle != 1 || busy != 10 || after != 1 {
			t.Errorf("%d looks while idle, %d in a second with a program, %d after it", idle, busy, after)
		}
	})
}

func TestAMachineThatWasAwayDoesNotLookAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		looks := 0
		list := func() ([]netip.AddrPort, error) {
			looks++
			if looks == 1 {
				time.Sleep(time.Hour) // as a pause: the next tick is long overdue
			}
			return nil, nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		go New(1, logs.New(nil, "debug")).follow(ctx, &told{}, list, 100*time.Millisecond)

		time.Sleep(time.Hour + 50*time.Millisecond)
		atOnce := looks
		time.Sleep(100 * time.Millisecond)
		later := looks
		cancel()
		synctest.Wait()

		if atOnce != 1 || later != 2 {
			t.Errorf("%d looks at once, %d after a while", atOnce, later)
		}
	})
}

func ask(t *testing.T, at netip.AddrPort, text string) string {
	t.Helper()
	c, err := net.Dial("tcp4", at.String())
	if err != nil {
		return ""
	}
	defer func() { _ = c.Close() }()
	_, _ = io.WriteString(c, text)
	_ = c.(*net.TCPConn).CloseWrite()
	got, _ := io.ReadAll(c)
	return string(got)
}

func BenchmarkDiag(b *testing.B) {
	d, err := openDiag()
	if err != nil {
		b.Skip(err)
	}
	defer d.close()
	for b.Loop() {
		if _, err := d.list(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkProc(b *testing.B) {
	for b.Loop() {
		if _, err := listProc(); err != nil {
			b.Fatal(err)
		}
	}
}
