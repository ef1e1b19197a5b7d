package entry

import (
	"errors"
	"fmt"
	"net/http"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	headerPrefix = "X-Metadata-"
	xattrPrefix  = "user.e2b."
	// Linux limits an xattr's name to 255 bytes; what is left after the prefix.
	maxKey = 255 - len(xattrPrefix)
	// One block of ext4 holds all of an inode's xattrs.
	maxMetadata = 4096
)

// MetadataError says which metadata of an upload cannot be stored, and why.
type MetadataError struct{ Reason string }

func (e MetadataError) Error() string { return "invalid metadata: " + e.Reason }

// FromHeaders collects the X-Metadata-* headers of an upload; keys are lower
// case, the first value of a header counts.
//
// Errors: MetadataError.
func FromHeaders(h http.Header) (map[string]string, error) {
	var found map[string]string
	total := 0
	for name, values := range h {
		key, ok := strings.CutPrefix(name, headerPrefix)
		if !ok || len(values) == 0 {
			continue
		}
		key = strings.ToLower(key)
		value := values[0]
		if key == "" || !printable(key) {
			return nil, MetadataError{fmt.Sprintf("key %q must be printable US-ASCII and not empty", key)}
		}
		if len(key) > maxKey {
			return nil, MetadataError{fmt.Sprintf("key of %d bytes is too long: the limit is %d", len(key), maxKey)}
		}
		if !printable(value) {
			return nil, MetadataError{fmt.Sprintf("value of %q must be printable US-ASCII", key)}
		}
		if found == nil {
			found = map[string]string{}
		}
		found[key] = value
		total += len(xattrPrefix) + len(key) + len(value)
	}
	if total > maxMetadata {
		return nil, MetadataError{fmt.Sprintf("%d bytes in all are too many: the limit is %d", total, maxMetadata)}
	}
	return found, nil
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}

// Metadata reads the metadata stored on path; nil when there is none.
func Metadata(path string) map[string]string {
	keys, err := keysOf(func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) })
	if err != nil || len(keys) == 0 {
		return nil
	}
	found := make(map[string]string, len(keys))
	buf := make([]byte, maxMetadata)
	for _, key := range keys {
		if n, err := unix.Lgetxattr(path, xattrPrefix+key, buf); err == nil {
			found[key] = strings.ToValidUTF8(string(buf[:n]), "\uFFFD")
		}
	}
	return found
}

// SetMetadata makes wanted the whole metadata of an open file.
func SetMetadata(fd int, wanted map[string]string) error {
	old, err := keysOf(func(buf []byte) (int, error) { return unix.Flistxattr(fd, buf) })
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		return fmt.Errorf("list metadata: %w", err)
	}
	for _, key := range old {
		if _, keep := wanted[key]; !keep {
			if err := unix.Fremovexattr(fd, xattrPrefix+key); err != nil && !errors.Is(err, unix.ENODATA) {
				return fmt.Errorf("remove metadata %q: %w", key, err)
			}
		}
	}
	for key, value := range wanted {
		if err := unix.Fsetxattr(fd, xattrPrefix+key, []byte(value), 0); err != nil {
			return fmt.Errorf("store metadata %q: %w", key, err)
		}
	}
	return nil
}

// keysOf lists the metadata keys that list names. The common file has none and costs one call.
func keysOf(list func([]byte) (int, error)) ([]string, error) {
	n, err := list(nil)
	if err != nil || n == 0 {
		return nil, err
	}
	buf := make([]byte, n+1024)
	if n, err = list(buf); err != nil {
		return nil, err
	}
	var keys []string
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if key, ok := strings.CutPrefix(name, xattrPrefix); ok && key != "" {
			keys = append(keys, strings.ToValidUTF8(key, "\uFFFD"))
		}
	}
	return keys, nil
}
