package asuser

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"emberbox/agent/internal/users"
)

func nobody(t *testing.T) *users.User {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: acts as another user")
	}
	return &users.User{Name: "someone", UID: 4242, GID: 4243, Groups: []uint32{4243, 4244}}
}

func open(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "asuser")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestFilesAreTheUsers(t *testing.T) {
	u := nobody(t)
	path := filepath.Join(open(t), "f")

	err := Do(u, func() error { return os.WriteFile(path, nil, 0o600) })

	var st unix.Stat_t
	if err != nil || unix.Stat(path, &st) != nil || st.Uid != 4242 || st.Gid != 4243 {
		t.Errorf("%v, owner %d:%d", err, st.Uid, st.Gid)
	}
}

func TestRootsFilesAreOutOfReachAndGroupsCount(t *testing.T) {
	u := nobody(t)
	dir := open(t)
	secret, grouped := filepath.Join(dir, "secret"), filepath.Join(dir, "grouped")
	for _, path := range []string{secret, grouped} {
		if err := os.WriteFile(path, []byte("x"), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(grouped, 0, 4244); err != nil {
		t.Fatal(err)
	}

	errSecret := Do(u, func() error { _, err := os.ReadFile(secret); return err })
	errGrouped := Do(u, func() error { _, err := os.ReadFile(grouped); return err })
	errChown := Do(u, func() error { return os.Chown(grouped, 4242, 4242) })

	if !errors.Is(errSecret, fs.ErrPermission) || errGrouped != nil || !errors.Is(errChown, fs.ErrPermission) {
		t.Errorf("secret %v, grouped %v, chown %v", errSecret, errGrouped, errChown)
	}
}

func TestOverridingBendsModesAndNoOwnership(t *testing.T) {
	u := nobody(t)
	dir := open(t)
	closed := filepath.Join(dir, "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	made := filepath.Join(closed, "made")

	errMake := Overriding(u, func() error { return os.Mkdir(made, 0o755) })
	errChown := Overriding(u, func() error { return os.Chown(closed, 4242, 4243) })
	errAfter := Do(u, func() error { return os.Mkdir(made+"2", 0o755) })

	var st unix.Stat_t
	if errMake != nil || unix.Stat(made, &st) != nil || st.Uid != 4242 || st.Gid != 4243 {
		t.Errorf("%v, owner %d:%d", errMake, st.Uid, st.Gid)
	}
	if !errors.Is(errChown, fs.ErrPermission) || !errors.Is(errAfter, fs.ErrPermission) {
		t.Errorf("chown %v, afterwards %v", errChown, errAfter)
	}
}

// Every thread of the program must still be root afterwards, whatever ran meanwhile.
func TestTheIdentityDoesNotLeak(t *testing.T) {
	u := nobody(t)
	dir := open(t)
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}

	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 300 {
				if err := Do(u, func() error { _, err := os.ReadFile(secret); return err }); !errors.Is(err, fs.ErrPermission) {
					t.Errorf("as the user: %v", err)
				}
				if _, err := os.ReadFile(secret); err != nil {
					t.Errorf("as root: %v", err)
				}
			}
		})
	}
	wg.Wait()

	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		status, err := os.ReadFile("/proc/self/task/" + task.Name() + "/status")
		if err != nil {
			continue
		}
		for line := range strings.SplitSeq(string(status), "\n") {
			if f := strings.Fields(line); len(f) == 5 && (f[0] == "Uid:" || f[0] == "Gid:") && f[4] != "0" {
				t.Errorf("thread %s kept %s", task.Name(), line)
			}
		}
	}
}

func TestAnotherUserIsRefusedWithoutRoot(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may act as anyone")
	}
	err := Do(&users.User{Name: "x", UID: uint32(os.Geteuid()) + 1}, func() error { return nil })
	if !errors.Is(err, syscall.EPERM) {
		t.Errorf("got %v", err)
	}
}

func BenchmarkDo(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	u := &users.User{Name: "someone", UID: 4242, GID: 4243, Groups: []uint32{4243}}
	for b.Loop() {
		if err := Do(u, func() error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
