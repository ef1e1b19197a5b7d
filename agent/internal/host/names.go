package host

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// isHostname and isMachineID are written out: regular expressions cost half a
// millisecond at every start.
func isHostname(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

func isMachineID(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'f') && (c < '0' || c > '9') {
			return false
		}
	}
	return len(s) == 32
}

// ErrBadName says that a host name or machine id has not the form it must have.
var ErrBadName = errors.New("bad name")

// SetHostname names the machine, in the kernel, /etc/hostname and /etc/hosts
// (without which sudo complains on every call).
func SetHostname(name string) error {
	if !isHostname(name) {
		return fmt.Errorf("%w: host name %q must be 1-63 letters, digits and inner hyphens", ErrBadName, name)
	}
	if now, err := os.Hostname(); err != nil || now != name {
		if err := allowed(unix.Sethostname([]byte(name))); err != nil {
			return fmt.Errorf("set host name: %w", err)
		}
	}
	if err := writeIfChanged("/etc/hostname", []byte(name+"\n")); err != nil {
		return err
	}
	return SetHost("127.0.1.1", name)
}

const machineID = "/etc/machine-id"

// SetMachineID writes /etc/machine-id (32 lower-case hex digits).
func SetMachineID(id string) error {
	if !isMachineID(id) {
		return fmt.Errorf("%w: machine id must be 32 lower-case hex digits", ErrBadName)
	}
	if err := writeIfChanged(machineID, []byte(id+"\n")); err != nil {
		return err
	}
	// Everybody's programs read it; the image may carry it readable to root alone.
	const mode = 0o444
	if info, err := os.Stat(machineID); err == nil && info.Mode().Perm() == mode {
		return nil
	}
	if err := os.Chmod(machineID, mode); !errors.Is(err, unix.EROFS) {
		return allowed(err)
	}
	return nil
}

const hostsMark = "# set by emberd"

// SetHost makes name resolve to address in /etc/hosts: one marked line per
// address, replaced when it changes.
func SetHost(address, name string) error {
	old, err := os.ReadFile("/etc/hosts")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var kept []string
	for line := range strings.SplitSeq(strings.TrimRight(string(old), "\n"), "\n") {
		f := strings.Fields(line)
		if strings.HasSuffix(line, hostsMark) && len(f) > 1 && (f[0] == address || f[1] == name) {
			continue
		}
		kept = append(kept, line)
	}
	kept = append(kept, address+"\t"+name+"\t"+hostsMark)
	return writeIfChanged("/etc/hosts", []byte(strings.TrimLeft(strings.Join(kept, "\n"), "\n")+"\n"))
}

// WriteRunFile writes /run/e2b/<name>, where the clients' documentation tells
// shells to look for the sandbox's identity.
func WriteRunFile(name, value string) error {
	const dir = "/run/e2b"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return allowed(err)
	}
	return writeIfChanged(filepath.Join(dir, name), []byte(value))
}

// writeIfChanged writes in place: the file may be a bind mount, which cannot be
// renamed over. A read-only file system is not an error.
func writeIfChanged(path string, content []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
		return nil
	}
	err := overwrite(path, content)
	if errors.Is(err, unix.EROFS) {
		return nil
	}
	return allowed(err)
}

// overwrite does not empty the file first: ext4 would free its blocks, find new
// ones and write them out at once, all on the way to a sandbox's first answer.
func overwrite(path string, content []byte) (err error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if _, err := file.Write(content); err != nil {
		return err
	}
	if info, err := file.Stat(); err != nil || info.Size() == int64(len(content)) {
		return err
	}
	return file.Truncate(int64(len(content)))
}
