// Package paths turns a client's path into an absolute one for a user. It is
// text only: whether the user may go there, the kernel decides (see asuser).
package paths

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// maxPath is the kernel's PATH_MAX, with its closing zero.
const maxPath = 4096

// ErrNUL and ErrTooLong say why a path can never be one.
var (
	ErrNUL     = errors.New("path contains a NUL byte")
	ErrTooLong = fmt.Errorf("path is longer than %d bytes", maxPath-1)
)

// Resolve expands path for a user with that home: empty is the default work
// directory (or home), `~` and relative paths start at home. The result is
// absolute and clean.
//
// Errors: ErrNUL, ErrTooLong, and `~name` (another user's home) which is not offered.
func Resolve(path, home, workdir string) (string, error) {
	if path == "" {
		path = workdir
	}
	if hasNUL(path) {
		return "", ErrNUL
	}
	switch {
	case path == "~" || path == "":
		path = home
	case strings.HasPrefix(path, "~/"):
		path = filepath.Join(home, path[2:])
	case path[0] == '~':
		return "", fmt.Errorf("cannot expand %q: only ~ and ~/... are expanded; write ./%s for a file of that name", path, path)
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(home, path)
	}
	path = filepath.Join("/", path)
	if hasNUL(path) { // of the home: users write passwd files
		return "", ErrNUL
	}
	if len(path) >= maxPath {
		return "", ErrTooLong
	}
	return path, nil
}

func hasNUL(path string) bool { return strings.IndexByte(path, 0) >= 0 }
