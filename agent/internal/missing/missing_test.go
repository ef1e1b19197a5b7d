package missing

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/users"
)

var someone = &users.User{Name: "someone", UID: 4242, GID: 4243, Groups: []uint32{4243}}

// world is a directory of root's that everyone may search, on the root's own mount.
func world(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: acts as another user")
	}
	dir, err := os.MkdirTemp("/", "emberd-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func owned(t *testing.T, path string, perm os.FileMode) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil || st.Uid != someone.UID || st.Gid != someone.GID || os.FileMode(st.Mode&0o7777) != perm {
		t.Errorf("%s: %v, owner %d:%d, mode %o", path, err, st.Uid, st.Gid, st.Mode)
	}
}

func refused(t *testing.T, path string) {
	t.Helper()
	if fd, err := File(someone, path, unix.EACCES); !errors.Is(err, unix.EACCES) {
		_ = unix.Close(fd)
		t.Errorf("%s: file: %v", path, err)
	}
}

func TestAFileAndItsParentsAreTheUsers(t *testing.T) {
	dir := world(t)
	path := filepath.Join(dir, "a/b/f")

	fd, err := File(someone, path, fmt.Errorf("open: %w", unix.EACCES))
	must(t, err)
	_, err = unix.Write(fd, []byte("content"))
	must(t, err)
	must(t, unix.Close(fd))

	owned(t, filepath.Join(dir, "a"), 0o755)
	owned(t, filepath.Join(dir, "a/b"), 0o755)
	owned(t, path, 0o644)
	if got, err := os.ReadFile(path); err != nil || string(got) != "content" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestDirectoriesAreMadeAndExistingOnesKept(t *testing.T) {
	dir := world(t)
	must(t, os.Mkdir(filepath.Join(dir, "a"), 0o755))

	for range 2 {
		must(t, Dirs(someone, filepath.Join(dir, "a/b/c"), unix.EPERM))
	}

	owned(t, filepath.Join(dir, "a/b/c"), 0o755)
	var st unix.Stat_t
	if must(t, unix.Stat(filepath.Join(dir, "a"), &st)); st.Uid != 0 {
		t.Errorf("root's directory was given to %d", st.Uid)
	}
}

func TestOtherErrorsAreNoRefusal(t *testing.T) {
	dir := world(t)
	for _, given := range []error{nil, unix.EROFS, unix.ENOSPC, unix.ENOTDIR} {
		if err := Dirs(someone, filepath.Join(dir, "d"), given); !errors.Is(err, given) {
			t.Errorf("%v became %v", given, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, "d")); !os.IsNotExist(err) {
		t.Error("a directory was made")
	}
}

func TestWhatExistsIsNotTouched(t *testing.T) {
	dir := world(t)
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	must(t, os.WriteFile(file, []byte("root's"), 0o644))
	must(t, os.Symlink(filepath.Join(dir, "nowhere"), link))
	must(t, unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600))

	for _, name := range []string{"file", "link", "pipe", "link/x", "file/x"} {
		refused(t, filepath.Join(dir, name))
	}
	if err := Dirs(someone, file, unix.EACCES); !errors.Is(err, unix.EACCES) {
		t.Errorf("a directory in the place of a file: %v", err)
	}

	var st unix.Stat_t
	if got, err := os.ReadFile(file); err != nil || string(got) != "root's" || unix.Stat(file, &st) != nil || st.Uid != 0 {
		t.Errorf("%q, %v, owner %d", got, err, st.Uid)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 3 {
		t.Errorf("%v, %v", left, err)
	}
}

func TestTheWayMustBeTheUsersAndWithoutLinks(t *testing.T) {
	dir := world(t)
	must(t, os.Mkdir(filepath.Join(dir, "private"), 0o700))
	must(t, os.Mkdir(filepath.Join(dir, "real"), 0o755))
	must(t, os.Symlink("real", filepath.Join(dir, "link")))

	refused(t, filepath.Join(dir, "private/f"))
	refused(t, filepath.Join(dir, "private/sub/f"))
	refused(t, filepath.Join(dir, "link/f"))
	refused(t, filepath.Join(dir, "link/sub/f"))

	for _, name := range []string{"private", "real"} {
		if left, err := os.ReadDir(filepath.Join(dir, name)); err != nil || len(left) > 0 {
			t.Errorf("%s: %v, %v", name, left, err)
		}
	}
}

func TestAnotherMountAndTheKernelsFoldersAreClosed(t *testing.T) {
	dir := world(t)
	mount := filepath.Join(dir, "mount")
	must(t, os.Mkdir(mount, 0o755))
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, "mode=755,size=64k"); err != nil {
		t.Skipf("needs the right to mount: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mount, unix.MNT_DETACH) })

	refused(t, filepath.Join(mount, "f"))
	refused(t, filepath.Join(mount, "sub/f"))
	if left, err := os.ReadDir(mount); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
	for _, path := range []string{"/proc/x", "/sys/x", "/dev/x", "/dev", "/run/e2b", "/run/e2b/x"} {
		if mayMend(someone, path, unix.EACCES) {
			t.Errorf("%s is open", path)
		}
	}
	if !mayMend(someone, "/devices/x", unix.EACCES) || mayMend(&users.User{Name: "root"}, "/x", unix.EPERM) {
		t.Error("/devices must be open, and nothing lent to root")
	}
}

func TestOnlyTheSameFileIsRemoved(t *testing.T) {
	dir := world(t)
	path := filepath.Join(dir, "f")
	fd, err := File(someone, path, unix.EACCES)
	must(t, err)
	defer func() { _ = unix.Close(fd) }()
	must(t, os.Rename(path, path+"-moved"))
	must(t, os.WriteFile(path, nil, 0o644))

	errOther := Remove(someone, path, fd, unix.EACCES)
	errSame := Remove(someone, path+"-moved", fd, unix.EACCES)

	left, err := os.ReadDir(dir)
	if !errors.Is(errOther, unix.EACCES) || errSame != nil || err != nil || len(left) != 1 || left[0].Name() != "f" {
		t.Errorf("other %v, same %v, left %v", errOther, errSame, left)
	}
}

// A process of the user exchanges a directory of root's, which lies in its own, for a link to another one.
func TestASwappedLinkIsNeverFollowed(t *testing.T) {
	dir := world(t)
	mine, target := filepath.Join(dir, "mine"), filepath.Join(dir, "target")
	d, link := filepath.Join(mine, "d"), filepath.Join(mine, "link")
	for _, path := range []string{mine, target, d} {
		must(t, os.Mkdir(path, 0o755))
	}
	must(t, os.Symlink(target, link))
	must(t, os.Chown(mine, int(someone.UID), int(someone.GID)))
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			err := asuser.Do(someone, func() error {
				return unix.Renameat2(unix.AT_FDCWD, d, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE)
			})
			if err != nil {
				t.Errorf("swap: %v", err)
				return
			}
		}
	}()

	made, shut := 0, 0
	for i := 0; i < 2000 || (i < 1_000_000 && (made == 0 || shut == 0)); i++ {
		fd, err := File(someone, filepath.Join(d, fmt.Sprintf("sub%d", i), "f"), unix.EACCES)
		if err != nil {
			shut++
			continue
		}
		_ = unix.Close(fd)
		made++
	}
	close(stop)
	<-stopped

	if left, err := os.ReadDir(target); err != nil || len(left) > 0 {
		t.Errorf("%d entries behind the link, %v", len(left), err)
	}
	if made == 0 || shut == 0 {
		t.Errorf("%d were made, %d refused: nothing was raced", made, shut)
	}
}
