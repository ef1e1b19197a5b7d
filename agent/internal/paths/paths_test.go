package paths

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

func TestResolve(t *testing.T) {
	for _, c := range []struct{ path, workdir, want string }{
		{"", "", "/home/u"},
		{"", "/work", "/work"},
		{"", "rel", "/home/u/rel"},
		{"~", "/work", "/home/u"},
		{"~/a", "", "/home/u/a"},
		{"a/../b", "", "/home/u/b"},
		{"./~x", "", "/home/u/~x"},
		{"../../..", "", "/"},
		{"../../../../etc/passwd", "", "/etc/passwd"},
		{"/etc//x/./y/", "", "/etc/x/y"},
		{"//etc", "", "/etc"},
	} {
		got, err := Resolve(c.path, "/home/u", c.workdir)
		if err != nil || got != c.want {
			t.Errorf("Resolve(%q, workdir %q) = %q, %v; want %q", c.path, c.workdir, got, err, c.want)
		}
	}
}

func TestResolveRefusesWhatIsNoPath(t *testing.T) {
	if _, err := Resolve("a\x00b", "/h", ""); !errors.Is(err, ErrNUL) {
		t.Errorf("NUL: %v", err)
	}
	if _, err := Resolve(strings.Repeat("a/", 3000), "/h", ""); !errors.Is(err, ErrTooLong) {
		t.Errorf("too long: %v", err)
	}
	if _, err := Resolve("~root/x", "/h", ""); err == nil {
		t.Error("~root was expanded")
	}
}

func FuzzResolve(f *testing.F) {
	for _, seed := range []string{"", "~", "~/x", "~x", "/", "a/../..", "\x00", "/..//.", "~/../~", "\xff"} {
		f.Add(seed, "/home/u", "")
		f.Add(seed, "/", "/w")
	}
	f.Fuzz(func(t *testing.T, path, home, workdir string) {
		if !filepath.IsAbs(home) {
			t.Skip()
		}
		got, err := Resolve(path, home, workdir)
		if err != nil {
			if got != "" {
				t.Fatalf("an error and a path: %q, %v", got, err)
			}
			return
		}
		if !filepath.IsAbs(got) || filepath.Clean(got) != got || strings.IndexByte(path, 0) >= 0 || len(got) >= maxPath {
			t.Fatalf("Resolve(%q, %q, %q) = %q", path, home, workdir, got)
		}
		again, err := Resolve(got, home, workdir)
		if err != nil || again != got {
			t.Fatalf("not stable: %q then %q, %v", got, again, err)
		}
	})
}
