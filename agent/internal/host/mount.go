package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// ErrBadMount says that a volume mount is not one.
var ErrBadMount = errors.New("bad volume mount")

const mountPatience = 10 * time.Second

// Runner runs a program as root and waits for it; the reaper offers one.
type Runner func(ctx context.Context, argv ...string) (output string, err error)

// MountNFS mounts target (host:/export) on path, unless something of that
// source is there already.
func MountNFS(ctx context.Context, run Runner, target, path string) error {
	if !filepath.IsAbs(path) || strings.HasPrefix(target, "-") || !strings.Contains(target, ":") {
		return fmt.Errorf("%w: want an absolute path and a target host:/export, got '%s' on '%s'", ErrBadMount, target, path)
	}
	path = filepath.Clean(path)
	if source := mountedOn(path); source == target {
		return nil
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, mountPatience)
	defer cancel()
	const options = "nfsvers=3,proto=tcp,mountproto=tcp,nolock,noacl,hard"
	if out, err := run(ctx, "mount", "-t", "nfs", "-o", options, target, path); err != nil {
		return fmt.Errorf("mount '%s' on '%s': %w: %s", target, path, err, strings.TrimSpace(out))
	}
	return nil
}

func mountedOn(path string) string {
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return ""
	}
	source := ""
	for line := range strings.SplitSeq(string(table), "\n") {
		if f := strings.Fields(line); len(f) > 1 && f[1] == path {
			source = f[0]
		}
	}
	return source
}
