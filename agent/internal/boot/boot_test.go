package boot

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

const line = `console=ttyS0 quiet emberd.mode=vm emberd.layers=2 emberd.hostname=sbx emberd.address=169.254.0.21/30 ` +
	`emberd.gateway=169.254.0.22 emberd.dns=169.254.0.22,192.0.2.1 x="a b" emberd.control_hash=ab` + "\n"

func TestOptions(t *testing.T) {
	words := parse(line)
	o, err := optionsOf(words)

	if err != nil || o.layers != 2 || o.hostname != "sbx" || o.address.String() != "169.254.0.21/30" ||
		o.gateway.String() != "169.254.0.22" || len(o.dns) != 2 || o.controlHash != "ab" || words["x"] != "a b" {
		t.Errorf("%+v %v %q", o, err, words)
	}
}

func TestBadOptionsAreNamed(t *testing.T) {
	for _, bad := range []string{
		"", "emberd.layers=0", "emberd.layers=99", "emberd.layers=x",
		"emberd.layers=1 emberd.address=1.2.3.4", "emberd.layers=1 emberd.address=::1/64",
		"emberd.layers=1 emberd.gateway=1.2.3.4", "emberd.layers=1 emberd.address=1.2.3.4/30 emberd.gateway=x",
		"emberd.layers=1 emberd.dns=1.2.3.4,x",
	} {
		if o, err := optionsOf(parse(bad)); err == nil {
			t.Errorf("%q was taken: %+v", bad, o)
		}
	}
}

func TestNetmask(t *testing.T) {
	for bits, want := range map[int]string{30: "255.255.255.252", 24: "255.255.255.0", 0: "0.0.0.0", 32: "255.255.255.255"} {
		if got := netmask(bits).String(); got != want {
			t.Errorf("/%d: %s, want %s", bits, got, want)
		}
	}
}

func TestADiskIsKnownByItsMagic(t *testing.T) {
	for want, put := range map[string]struct {
		at    int
		bytes []byte
	}{
		"erofs": {1024, []byte{0xe2, 0xe1, 0xf5, 0xe0}},
		"ext4":  {1024 + 56, []byte{0x53, 0xef}},
		"":      {0, []byte{1}},
	} {
		disk := make([]byte, 4096)
		copy(disk[put.at:], put.bytes)
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, disk, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := kindOf(path)
		if got != want || want == "" && !errors.Is(err, errUnknownDisk) {
			t.Errorf("%q: got %q, %v", want, got, err)
		}
	}
}

func TestAnOrdinaryProcessDoesNotBoot(t *testing.T) {
	if Wanted() {
		t.Error("a test wants to boot")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(line)
	f.Add(`a="`)
	f.Fuzz(func(t *testing.T, text string) {
		if o, err := optionsOf(parse(text)); err == nil && (o.layers < 1 || o.layers > maxLayers) {
			t.Fatalf("%q gave %+v", text, o)
		}
	})
}
