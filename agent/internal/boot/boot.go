// Package boot brings a microVM from the kernel's first program to a machine:
// it loads modules, joins the disks, mounts what a Linux expects, sets up the
// network and moves into the new root. The agent then goes on in the same
// process, as PID 1.
//
// The kernel's command line says what to do (the node writes it):
//
//	emberd.mode=vm            boot as the machine's first program; without it nothing here runs
//	emberd.layers=N           /dev/vda, /dev/vdb, ... are N read-only layers (erofs or ext4), lowest first;
//	                          the disk after them is the upper (ext4; upper directory /u, work directory /w)
//	emberd.hostname=NAME
//	emberd.address=A/P        of eth0, IPv4
//	emberd.gateway=A
//	emberd.dns=A[,A]
//	emberd.control_hash=HEX   SHA-256 of the secret that opens the agent's control routes
//
// The initramfs holds /modules/load, which names the modules to insert, one
// path a line in load order, and the folders /dev, /proc, /sys and /newroot.
package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	newRoot = "/newroot"
	disks   = "/disks"
)

// Machine is what a booted microVM hands to the agent.
type Machine struct {
	ControlHash string
	Hostname    string
	// Disk is an open directory of the upper's file system, to freeze it by.
	Disk int
	// Cgroups is where cgroup v2 is mounted.
	Cgroups string
}

// Wanted says whether this process is a microVM's first program. It costs
// other starts one look at a number.
func Wanted() bool {
	if os.Getpid() != 1 {
		return false
	}
	// The initramfs has no /proc yet; a machine that has one is asked there.
	if _, err := os.Stat("/modules/load"); err != nil {
		return false
	}
	if err := mountKernel("/proc", "proc"); err != nil {
		return false
	}
	line, err := os.ReadFile("/proc/cmdline")
	return err == nil && parse(string(line))["emberd.mode"] == "vm"
}

// Run boots. It does every step once, in order; an error names its step, and
// the machine cannot go on.
func Run() (*Machine, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	o, err := optionsOf(parse(string(line)))
	if err != nil {
		return nil, fmt.Errorf("kernel command line: %w", err)
	}
	m := &Machine{ControlHash: o.controlHash, Hostname: o.hostname, Cgroups: "/sys/fs/cgroup"}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"mount the kernel's file systems", mountFirst},
		{"load modules", loadModules},
		{"join the disks", func() (err error) { m.Disk, err = joinDisks(o.layers); return err }},
		{"mount into the new root", mountAll},
		{"move into the new root", switchRoot},
		{"set up the network", func() error { return setUpNetwork(o) }},
		{"set the machine's limits", setLimits},
	} {
		if err := step.do(); err != nil {
			return nil, fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return m, nil
}

// setLimits gives the machine's programs as many descriptors as a container
// gets, and keeps the OOM killer away from its first program.
func setLimits() error {
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	many := unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &many)
}

// switchRoot makes the new root the root of this process and all after it. The
// initramfs is emptied first: what it holds is memory.
func switchRoot() error {
	for _, path := range []string{"/modules", "/init"} {
		if err := os.RemoveAll(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, path := range []string{"/sys", "/proc"} {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := unix.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Chdir("/")
}

// loadModules inserts what /modules/load names. What the kernel has already is no error.
func loadModules() error {
	list, err := os.ReadFile("/modules/load")
	if err != nil {
		return err
	}
	for path := range strings.SplitSeq(string(list), "\n") {
		if path = strings.TrimSpace(path); path == "" {
			continue
		}
		if err := loadModule(path); err != nil && !errors.Is(err, unix.EEXIST) {
			// A missing driver shows as a missing disk or interface, with its own error; the rest may do.
			fmt.Fprintf(os.Stderr, "emberd: load %s: %v\n", path, err)
		}
	}
	return nil
}

func loadModule(path string) error {
	file, err := os.Open(filepath.Clean(path))
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	return unix.FinitModule(int(file.Fd()), "", 0)
}
