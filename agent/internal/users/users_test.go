package users

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestLookup(t *testing.T) {
	dir := t.TempDir()
	passwd, group := filepath.Join(dir, "passwd"), filepath.Join(dir, "group")
	write(t, passwd, "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/sh\nbroken:x:a:b::/:/\nmax:x:4294967295:1::/:/\nno:x:5\n")
	write(t, group, "root:x:0:\nuser:x:1000:\nsudo:x:27:user, other\n")
	db := At(passwd, group)

	u, err := db.Lookup("user")

	if err != nil || u.UID != 1000 || u.GID != 1000 || u.Home != "/home/user" || u.Shell != "/bin/sh" || !slices.Equal(u.Groups, []uint32{1000, 27}) {
		t.Errorf("%+v %v", u, err)
	}
	for _, name := range []string{"broken", "max", "no", "nobody", ""} {
		if _, err := db.Lookup(name); !errors.As(err, &UnknownError{}) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if db.Name(1000) != "user" || db.GroupName(27) != "sudo" || db.Name(77) != "77" {
		t.Error("wrong names")
	}
}

func TestAUserIsKnownByNumber(t *testing.T) {
	passwd := filepath.Join(t.TempDir(), "passwd")
	write(t, passwd, "user:x:1000:1000::/home/user:/bin/sh\n7:x:1001:1001::/seven:/bin/sh\nlate:x:7:7::/late:/bin/sh\n")
	db := At(passwd, passwd)

	for name, uid := range map[string]uint32{"1000": 1000, "0": 0, "7": 1001} {
		if u, err := db.Lookup(name); err != nil || u.UID != uid {
			t.Errorf("%q: %+v %v", name, u, err)
		}
	}
	for _, name := range []string{"1002", "-1", "4294967295", "0x0"} {
		if _, err := db.Lookup(name); !errors.As(err, &UnknownError{}) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestAUserAddedLaterIsFound(t *testing.T) {
	dir := t.TempDir()
	passwd, group := filepath.Join(dir, "passwd"), filepath.Join(dir, "group")
	db := At(passwd, group)
	if u, err := db.Lookup("root"); err != nil || u.Home != "/root" {
		t.Fatalf("an empty image has no root: %v", err)
	}

	write(t, passwd, "late:x:7:7::/late:/bin/sh\n")

	if u, err := db.Lookup("late"); err != nil || u.UID != 7 {
		t.Errorf("%+v %v", u, err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
