// Package watch tells what changes in a directory, on top of inotify, and as
// the asked user: what the user may not read is not watched.
package watch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	pb "emberbox/agent/gen/filesystem"
	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/entry"
	"emberbox/agent/internal/logs"
	"emberbox/agent/internal/users"
)

// Why a path cannot be watched.
var (
	ErrNotDirectory = errors.New("path is not a directory")
	ErrNetworkMount = errors.New("cannot watch a path on a network file system: set allow_network_mounts to try, events may be missing")
)

// Spec says what to watch.
type Spec struct {
	User      *users.User
	Path      string // absolute
	Recursive bool
	// Entries asks for the entry of each event, where it still exists.
	Entries bool
	// NetworkMounts allows paths on network file systems.
	NetworkMounts bool
}

// Watcher watches until Close.
type Watcher struct {
	// Events is closed after Close, or when the watcher broke.
	Events <-chan *pb.FilesystemEvent

	spec   Spec
	db     *users.DB
	log    *logs.Log
	file   *os.File // the inotify instance
	events chan *pb.FilesystemEvent
	closed chan struct{}

	// Owned by the loop, after New.
	dirs map[int32]string // watch descriptor to path relative to the root, "" for the root
	wds  map[string]int32
	// told are entries of a new directory found by looking, whose own events may still come.
	told map[string]struct{}
}

const (
	interest = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_DELETE | unix.IN_MOVED_FROM |
		unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK
	maxTold = 4096
)

// New starts watching.
//
// Errors: ErrNotDirectory, ErrNetworkMount, os.ErrNotExist, os.ErrPermission;
// EMFILE and ENOSPC when the kernel's inotify limits are reached.
func New(spec Spec, db *users.DB, log *logs.Log) (*Watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("start watcher: %w", err)
	}
	w := &Watcher{
		spec: spec, db: db, log: log,
		file:   os.NewFile(uintptr(fd), "inotify"),
		events: make(chan *pb.FilesystemEvent), closed: make(chan struct{}),
		dirs: map[int32]string{}, wds: map[string]int32{}, told: map[string]struct{}{},
	}
	w.Events = w.events
	err = asuser.Do(spec.User, func() error {
		info, err := os.Stat(spec.Path)
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return fmt.Errorf("%w: %s", ErrNotDirectory, spec.Path)
		}
		if remote, err := onNetwork(spec.Path); err != nil || remote && !spec.NetworkMounts {
			return errors.Join(err, fmt.Errorf("%w: %s", ErrNetworkMount, spec.Path))
		}
		if err := w.add(""); err != nil {
			return err
		}
		if spec.Recursive {
			w.addBelow("", nil)
		}
		return nil
	})
	if err != nil {
		_ = w.file.Close()
		return nil, err
	}
	go w.loop()
	return w, nil
}

// Close ends the watching. It may be called once.
func (w *Watcher) Close() {
	close(w.closed)
	_ = w.file.Close()
}

// Magic numbers of file systems whose changes others make unseen by this kernel.
var networkMagic = map[int64]bool{
	unix.NFS_SUPER_MAGIC: true, unix.SMB_SUPER_MAGIC: true, unix.CIFS_SUPER_MAGIC: true,
	unix.SMB2_SUPER_MAGIC: true, unix.FUSE_SUPER_MAGIC: true, unix.V9FS_MAGIC: true,
	unix.CEPH_SUPER_MAGIC: true, unix.AFS_SUPER_MAGIC: true,
}

func onNetwork(path string) (bool, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return false, err
	}
	return networkMagic[fs.Type&0xffffffff], nil
}

// add watches one directory, as the calling thread's user.
func (w *Watcher) add(rel string) error {
	flags := uint32(interest)
	if rel != "" {
		flags |= unix.IN_DONT_FOLLOW
	}
	raw, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	var wd int
	var addErr error
	if err := raw.Control(func(fd uintptr) {
		wd, addErr = unix.InotifyAddWatch(int(fd), filepath.Join(w.spec.Path, rel), flags)
	}); err != nil {
		return err
	}
	if addErr != nil {
		return fmt.Errorf("watch %s: %w", filepath.Join(w.spec.Path, rel), addErr)
	}
	w.dirs[int32(wd)] = rel
	w.wds[rel] = int32(wd)
	return nil
}

// addBelow watches every directory below rel and calls found for each entry.
// A directory that went away or may not be read is left out.
func (w *Watcher) addBelow(rel string, found func(rel string)) {
	entries, err := os.ReadDir(filepath.Join(w.spec.Path, rel))
	if err != nil {
		return
	}
	for _, e := range entries {
		below := filepath.Join(rel, e.Name())
		if found != nil {
			found(below)
		}
		if !e.IsDir() {
			continue
		}
		if err := w.add(below); err != nil {
			if !errors.Is(err, os.ErrNotExist) {
				w.log.Warn("filesystem", "directory not watched", "path", below, "error", err.Error())
			}
			continue
		}
		w.addBelow(below, found)
	}
}

func (w *Watcher) forget(rel string) {
	raw, err := w.file.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		for path, wd := range w.wds {
			if path == rel || strings.HasPrefix(path, rel+"/") {
				_, _ = unix.InotifyRmWatch(int(fd), uint32(wd))
				delete(w.wds, path)
				delete(w.dirs, wd)
			}
		}
	})
}

func (w *Watcher) loop() {
	defer close(w.events)
	buf := make([]byte, 32<<10)
	for {
		n, err := w.file.Read(buf)
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				w.log.Error("filesystem", "watcher broke", "path", w.spec.Path, "error", err.Error())
			}
			return
		}
		for at := 0; at+unix.SizeofInotifyEvent <= n; {
			// struct inotify_event { int wd; u32 mask; u32 cookie; u32 len; char name[len]; }
			wd := int32(binary.NativeEndian.Uint32(buf[at:]))
			mask := binary.NativeEndian.Uint32(buf[at+4:])
			size := int(binary.NativeEndian.Uint32(buf[at+12:]))
			name := strings.TrimRight(string(buf[at+unix.SizeofInotifyEvent:at+unix.SizeofInotifyEvent+size]), "\x00")
			at += unix.SizeofInotifyEvent + size
			if !w.handle(wd, mask, name) {
				return
			}
		}
	}
}

// handle turns one kernel event into ours and says whether to go on.
func (w *Watcher) handle(wd int32, mask uint32, name string) bool {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		w.log.Warn("filesystem", "watch events lost: too many at once", "path", w.spec.Path)
		return true
	}
	dir, known := w.dirs[wd]
	if !known {
		return true
	}
	if mask&unix.IN_IGNORED != 0 {
		delete(w.dirs, wd)
		if w.wds[dir] == wd {
			delete(w.wds, dir)
		}
		return true
	}
	rel := filepath.Join(dir, name)
	isDir := mask&unix.IN_ISDIR != 0
	switch {
	case mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF) != 0:
		// A directory below says so through its parent.
		if dir != "" {
			return true
		}
		kind := pb.EventType_EVENT_TYPE_REMOVE
		if mask&unix.IN_MOVE_SELF != 0 {
			kind = pb.EventType_EVENT_TYPE_RENAME
		}
		return w.emit(".", kind)
	case mask&unix.IN_CREATE != 0:
		if _, ok := w.told[rel]; ok {
			delete(w.told, rel)
			return true
		}
		if !w.emit(rel, pb.EventType_EVENT_TYPE_CREATE) {
			return false
		}
		return !isDir || !w.spec.Recursive || w.adopt(rel, true)
	case mask&unix.IN_MOVED_TO != 0:
		if !w.emit(rel, pb.EventType_EVENT_TYPE_CREATE) {
			return false
		}
		return !isDir || !w.spec.Recursive || w.adopt(rel, false)
	case mask&unix.IN_MODIFY != 0:
		return w.emit(rel, pb.EventType_EVENT_TYPE_WRITE)
	case mask&unix.IN_ATTRIB != 0:
		if name == "" {
			rel = "."
			if dir != "" {
				return true
			}
		}
		return w.emit(rel, pb.EventType_EVENT_TYPE_CHMOD)
	case mask&unix.IN_DELETE != 0:
		delete(w.told, rel)
		return w.emit(rel, pb.EventType_EVENT_TYPE_REMOVE)
	case mask&unix.IN_MOVED_FROM != 0:
		delete(w.told, rel)
		if isDir && w.spec.Recursive {
			w.forget(rel)
		}
		return w.emit(rel, pb.EventType_EVENT_TYPE_RENAME)
	}
	return true
}

// adopt watches a directory that appeared. What was put into a new one before
// it was watched is found by looking, and told.
func (w *Watcher) adopt(rel string, tell bool) bool {
	var found []string
	_ = asuser.Do(w.spec.User, func() error {
		if err := w.add(rel); err != nil {
			return err
		}
		w.addBelow(rel, func(below string) { found = append(found, below) })
		return nil
	})
	if !tell {
		return true
	}
	for _, below := range found {
		if len(w.told) >= maxTold {
			clear(w.told)
		}
		w.told[below] = struct{}{}
		if !w.emit(below, pb.EventType_EVENT_TYPE_CREATE) {
			return false
		}
	}
	return true
}

func (w *Watcher) emit(rel string, kind pb.EventType) bool {
	e := &pb.FilesystemEvent{Name: strings.ToValidUTF8(rel, "\uFFFD"), Type: kind}
	gone := kind == pb.EventType_EVENT_TYPE_REMOVE || kind == pb.EventType_EVENT_TYPE_RENAME
	if w.spec.Entries && !gone {
		e.Entry, _ = asuser.Get(w.spec.User, func() (*pb.EntryInfo, error) {
			return entry.Stat(w.db, filepath.Join(w.spec.Path, rel))
		})
	}
	select {
	case w.events <- e:
		return true
	case <-w.closed:
		return false
	}
}

// IsLimit says whether an error of New means that the kernel's limits for watches are reached.
func IsLimit(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENOSPC)
}
