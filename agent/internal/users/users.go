// Package users answers who a name is: uid, gids, home, shell.
//
// The databases are /etc/passwd and /etc/group as they are now: a sandbox may
// add users at any time. They are parsed here, without NSS, because a static
// program has no NSS, and kept until one of the two files changes.
package users

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// User is one line of /etc/passwd with the groups that /etc/group adds.
type User struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary and primary, for setgroups
	Home   string
	Shell  string
}

// UnknownError says that no user has this name.
type UnknownError struct{ Name string }

func (e UnknownError) Error() string { return "user: unknown user " + e.Name }

// DB reads the user databases under one root.
type DB struct {
	passwd, group string

	mu     sync.Mutex
	stamp  [2]stamp
	byName map[string]*User
	names  map[uint32]string
	groups map[uint32]string
}

type stamp struct {
	ino          uint64
	size         int64
	mtime, ctime syscall.Timespec
}

// Open returns the database of /etc.
func Open() *DB { return At("/etc/passwd", "/etc/group") }

// At returns the database of the given files.
func At(passwd, group string) *DB { return &DB{passwd: passwd, group: group} }

// Lookup returns the user of that name, or of that number where no name is the
// same: Dockerfiles say USER 1000.
//
// Errors: UnknownError.
func (d *DB) Lookup(name string) (*User, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	if u, ok := d.byName[name]; ok {
		return u, nil
	}
	if uid, err := id(name); err == nil {
		if u, ok := d.byName[d.names[uid]]; ok {
			return u, nil
		}
	}
	return nil, UnknownError{name}
}

// Name returns the name of a uid, or the number when it has none.
func (d *DB) Name(uid uint32) string { return d.nameIn(uid, false) }

// GroupName returns the name of a gid, or the number when it has none.
func (d *DB) GroupName(gid uint32) string { return d.nameIn(gid, true) }

func (d *DB) nameIn(id uint32, group bool) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	from := d.names
	if group {
		from = d.groups
	}
	if n, ok := from[id]; ok {
		return n
	}
	return strconv.FormatUint(uint64(id), 10)
}

func (d *DB) refresh() {
	now := [2]stamp{stampOf(d.passwd), stampOf(d.group)}
	if d.byName != nil && now == d.stamp {
		return
	}
	d.stamp = now
	d.byName, d.names, d.groups = map[string]*User{}, map[uint32]string{}, map[uint32]string{}
	members := map[string][]uint32{}
	eachLine(d.group, 4, func(f []string) {
		gid, err := id(f[2])
		if err != nil {
			return
		}
		if _, taken := d.groups[gid]; !taken {
			d.groups[gid] = f[0]
		}
		for m := range strings.SplitSeq(f[3], ",") {
			if m = strings.TrimSpace(m); m != "" {
				members[m] = append(members[m], gid)
			}
		}
	})
	eachLine(d.passwd, 7, func(f []string) {
		uid, err1 := id(f[2])
		gid, err2 := id(f[3])
		if err1 != nil || err2 != nil {
			return
		}
		if _, taken := d.byName[f[0]]; taken {
			return
		}
		u := &User{Name: f[0], UID: uid, GID: gid, Home: f[5], Shell: f[6], Groups: []uint32{gid}}
		for _, g := range members[f[0]] {
			if g != gid {
				u.Groups = append(u.Groups, g)
			}
		}
		if u.Home == "" {
			u.Home = "/"
		}
		d.byName[u.Name] = u
		if _, taken := d.names[uid]; !taken {
			d.names[uid] = u.Name
		}
	})
	// An image without /etc/passwd still has root.
	if _, ok := d.byName["root"]; !ok {
		d.byName["root"] = &User{Name: "root", Groups: []uint32{0}, Home: "/root", Shell: "/bin/sh"}
		d.names[0] = "root"
	}
	if _, ok := d.groups[0]; !ok {
		d.groups[0] = "root"
	}
}

func stampOf(path string) stamp {
	var st syscall.Stat_t
	if syscall.Stat(path, &st) != nil {
		return stamp{}
	}
	return stamp{st.Ino, st.Size, st.Mtim, st.Ctim}
}

func id(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == 1<<32-1 { // (uid_t)-1 means "leave it" to the kernel
		return 0, fmt.Errorf("id %d is reserved", n)
	}
	return uint32(n), err
}

func eachLine(path string, fields int, do func([]string)) {
	data, err := os.ReadFile(path)
	if err != nil {
		return
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		if f := strings.Split(line, ":"); len(f) >= fields {
			do(f)
		}
	}
}
