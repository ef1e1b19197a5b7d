// Package asuser runs file operations with the credentials of the asked user.
//
// emberd is root in the machine and paths come from outside. Checking a path
// and then using it as root loses every race against a symlink, so nothing is
// checked: the kernel itself decides, with the user's own identity, on the
// very call that does the work.
//
// Linux keeps credentials per thread. Do takes a thread for itself, gives it
// the user's file-system uid, gid and groups, drops its effective
// capabilities, and puts all back afterwards. A thread that cannot be put back
// (or whose function panicked) stays locked to its goroutine and dies with it.
// The Go runtime never clones new threads from a locked one, so the identity
// does not leak.
package asuser

import (
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"emberbox/agent/internal/users"
)

// Do runs f as u: every file-system call that f makes on its own goroutine is
// decided for that user. f must not start goroutines that touch files.
//
// When emberd is not root (tests), Do runs f as emberd for emberd's own user
// and refuses every other.
func Do(u *users.User, f func() error) error {
	if euid := unix.Geteuid(); euid != 0 {
		if uint32(euid) != u.UID {
			return fmt.Errorf("act as user %q: %w", u.Name, unix.EPERM)
		}
		return f()
	}
	return do(u, 0, f)
}

// Overriding is Do with one right more: the modes of directories and files do
// not bind f (CAP_DAC_OVERRIDE). What f creates still belongs to u from its
// first moment, so that nothing has to be given away afterwards. Only package
// missing has a use for it; f should be the one call that needs it.
//
// Errors: EPERM when emberd is not root, or has not got the right itself.
func Overriding(u *users.User, f func() error) error {
	if unix.Geteuid() != 0 {
		return fmt.Errorf("override modes for user %q: %w", u.Name, unix.EPERM)
	}
	return do(u, 1<<unix.CAP_DAC_OVERRIDE, f)
}

func do(u *users.User, kept uint32, f func() error) error {
	if err := acquire(); err != nil {
		return fmt.Errorf("act as user %q: %w", u.Name, err)
	}
	defer func() { <-slots }()
	runtime.LockOSThread()
	saved, err := enter(u, kept)
	if err != nil {
		return err // the thread stays locked: see the package's comment
	}
	if err = f(); saved.leave() {
		runtime.UnlockOSThread()
	}
	return err
}

// A file system that never answers (a user's own FUSE, a lost NFS server) keeps
// the thread that asked. They are counted, because the Go runtime ends a
// program that has too many threads or may have no more.
const (
	maxAtOnce = 128
	patience  = 10 * time.Second
)

var slots = make(chan struct{}, maxAtOnce)

// acquire takes one of the slots; EAGAIN when none becomes free in time.
func acquire() error {
	select {
	case slots <- struct{}{}:
		return nil
	default:
	}
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case slots <- struct{}{}:
		return nil
	case <-late.C:
		return unix.EAGAIN
	}
}

// Get is Do for a function that has an answer.
func Get[T any](u *users.User, f func() (T, error)) (T, error) {
	var got T
	err := Do(u, func() (err error) {
		got, err = f()
		return err
	})
	return got, err
}

type state struct {
	groups []uint32
	caps   [2]unix.CapUserData
	root   bool
}

// enter gives the calling thread u's identity and, of the first 32
// capabilities, those in kept. Order: groups need a capability, so they come
// first and the capabilities last.
func enter(u *users.User, kept uint32) (state, error) {
	s := state{groups: ownGroups, root: u.UID == 0}
	if err := capget(&s.caps); err != nil {
		return s, fmt.Errorf("read capabilities: %w", err)
	}
	if err := setgroups(u.Groups); err != nil {
		return s, fmt.Errorf("set groups of %q: %w", u.Name, err)
	}
	if err := setfsid(unix.SYS_SETFSGID, u.GID); err != nil {
		return s, fmt.Errorf("set group of %q: %w", u.Name, err)
	}
	if err := setfsid(unix.SYS_SETFSUID, u.UID); err != nil {
		return s, fmt.Errorf("set user %q: %w", u.Name, err)
	}
	if !s.root {
		dropped := s.caps
		dropped[0].Effective, dropped[1].Effective = kept, 0
		if err := capset(&dropped); err != nil {
			return s, fmt.Errorf("drop capabilities: %w", err)
		}
	}
	return s, nil
}

// leave puts emberd's identity back and says whether that worked.
func (s state) leave() bool {
	if !s.root && capset(&s.caps) != nil {
		return false
	}
	if setfsid(unix.SYS_SETFSUID, 0) != nil || setfsid(unix.SYS_SETFSGID, 0) != nil {
		return false
	}
	// A change of the fs uid resets the dumpable flag to fs.suid_dumpable, which may be 1.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	return capset(&s.caps) == nil && setgroups(s.groups) == nil
}

// ownGroups are emberd's, read before any thread takes another identity.
var ownGroups = func() []uint32 {
	gids, err := unix.Getgroups()
	if err != nil {
		return nil
	}
	own := make([]uint32, len(gids))
	for i, g := range gids {
		own[i] = uint32(g)
	}
	return own
}()

// The calls below are raw on purpose: the wrappers of package syscall change
// every thread of the process.

func setgroups(gids []uint32) error {
	var p unsafe.Pointer
	if len(gids) > 0 {
		p = unsafe.Pointer(&gids[0])
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(gids)), uintptr(p), 0); e != 0 {
		return e
	}
	return nil
}

// setfsid sets and reads back: setfsuid and setfsgid report no errors.
func setfsid(call uintptr, id uint32) error {
	_, _, _ = unix.RawSyscall(call, uintptr(id), 0, 0)
	if now, _, _ := unix.RawSyscall(call, ^uintptr(0), 0, 0); uint32(now) != id {
		return unix.EPERM
	}
	return nil
}

var capHeader = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}

func capget(into *[2]unix.CapUserData) error {
	h := capHeader
	if _, _, e := unix.RawSyscall(unix.SYS_CAPGET, uintptr(unsafe.Pointer(&h)), uintptr(unsafe.Pointer(&into[0])), 0); e != 0 {
		return e
	}
	return nil
}

func capset(from *[2]unix.CapUserData) error {
	h := capHeader
	if _, _, e := unix.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&h)), uintptr(unsafe.Pointer(&from[0])), 0); e != 0 {
		return e
	}
	return nil
}
