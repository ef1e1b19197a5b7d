package rest

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/entry"
	"emberbox/agent/internal/missing"
	"emberbox/agent/internal/users"
)

// written is one uploaded file in the answer.
type written struct {
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Path     string            `json:"path"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// upload writes one file (octet-stream) or several (multipart), each as the
// user, with missing parents, replacing what was there.
func (a *API) upload(w http.ResponseWriter, r *http.Request) {
	done, err := a.take(r)
	if err != nil {
		// A client that is still sending when the connection closes sees a reset instead of the
		// answer; so the rest is taken in, within reason.
		_, _ = io.CopyN(io.Discard, r.Body, maxDrained)
		failWith(w, err)
		return
	}
	reply(w, done)
}

// maxDrained bounds how much of a refused upload is taken in to deliver the refusal.
const maxDrained = 256 << 20

func (a *API) take(r *http.Request) ([]written, error) {
	if err := a.mayUse(r, "write"); err != nil {
		return nil, err
	}
	u, err := a.user(r.URL.Query().Get("username"))
	if err != nil {
		return nil, err
	}
	metadata, err := entry.FromHeaders(r.Header)
	if err != nil {
		return nil, err
	}
	body, size, err := bodyOf(r)
	if err != nil {
		return nil, err
	}
	up := uploader{api: a, user: u, metadata: metadata, path: r.URL.Query().Get("path")}
	up.strict = up.path == "" && a.bySignature(r)
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	switch {
	case err == nil && kind == "multipart/form-data":
		err = up.multipart(body, params["boundary"])
	case kind == "application/octet-stream":
		err = up.raw(body, size)
	default:
		err = fail(http.StatusBadRequest, "content type '%s' is not supported: send multipart/form-data or application/octet-stream", r.Header.Get("Content-Type"))
	}
	return up.done, err
}

// bodyOf returns the request's body, decompressed, and its size where known (-1 where not).
func bodyOf(r *http.Request) (io.Reader, int64, error) {
	switch enc := strings.ToLower(strings.TrimSpace(r.Header.Get("Content-Encoding"))); enc {
	case "", "identity":
		return r.Body, r.ContentLength, nil
	case "gzip", "x-gzip":
		zip, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, 0, fail(http.StatusBadRequest, "body is not valid gzip: %w", err)
		}
		return zip, -1, nil
	default:
		return nil, 0, fail(http.StatusBadRequest, "content encoding '%s' is not supported: send identity or gzip", enc)
	}
}

type uploader struct {
	api      *API
	user     *users.User
	metadata map[string]string
	path     string // of the query; may be empty in multipart
	// strict keeps to what the user itself may do: whoever was handed a URL
	// signed for no path chooses paths, but did not choose the user.
	strict bool
	done   []written
}

func (up *uploader) raw(body io.Reader, size int64) error {
	if up.path == "" {
		return fail(http.StatusBadRequest, "query parameter 'path' is required with application/octet-stream")
	}
	return up.write(up.path, body, size)
}

func (up *uploader) multipart(body io.Reader, boundary string) error {
	if boundary == "" {
		return fail(http.StatusBadRequest, "multipart body has no boundary")
	}
	parts := multipart.NewReader(body, boundary)
	seen := map[string]bool{}
	for {
		part, err := parts.NextRawPart()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fail(http.StatusBadRequest, "malformed multipart body: %w", err)
		}
		if part.FormName() != "file" {
			continue
		}
		path := up.path
		if path == "" {
			// Part.FileName keeps the base name only; here the name is the path.
			_, params, err := mime.ParseMediaType(part.Header.Get("Content-Disposition"))
			if err != nil || params["filename"] == "" {
				return fail(http.StatusBadRequest, "multipart part 'file' has no filename and there is no query parameter 'path'")
			}
			path = params["filename"]
		}
		if seen[path] {
			return fail(http.StatusBadRequest, "two files of one upload have the path '%s'", path)
		}
		seen[path] = true
		if err := up.write(path, part, -1); err != nil {
			return err
		}
	}
	if len(up.done) == 0 {
		return fail(http.StatusBadRequest, "multipart body has no part named 'file'")
	}
	return nil
}

// buffers are big because each read and write is a system call; few are in use at once.
var buffers = sync.Pool{New: func() any { b := make([]byte, 512<<10); return &b }}

func (up *uploader) write(given string, body io.Reader, size int64) error {
	path, err := up.api.path(up.user, given)
	if err != nil {
		return err
	}
	file, created, err := up.open(path, size)
	if err != nil {
		return err
	}
	buf := buffers.Get().(*[]byte)
	n, err := io.CopyBuffer(struct{ io.Writer }{file}, struct{ io.Reader }{body}, *buf)
	buffers.Put(buf)
	if err != nil {
		if created {
			up.undo(int(file.Fd()), path)
		}
		_ = file.Close()
		return uploadError(path, err)
	}
	err = asuser.Do(up.user, func() error { return entry.SetMetadata(int(file.Fd()), up.metadata) })
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		if len(up.metadata) == 0 && errors.Is(err, unix.EPERM) {
			err = nil // writable but someone else's: its xattrs stay
		} else {
			return uploadError(path, err)
		}
	}
	up.api.Log.Debug("files", "written", "path", path, "user", up.user.Name, "bytes", fmt.Sprint(n))
	up.done = append(up.done, written{filepath.Base(path), "file", path, up.metadata})
	return nil
}

// open opens path for a whole new content as the user. A file that the user may
// not create is created for it (see package missing). It also says whether the
// file is new: a new one whose body does not arrive whole is removed again.
func (up *uploader) open(path string, size int64) (file *os.File, created bool, _ error) {
	file, err := asuser.Get(up.user, func() (file *os.File, err error) {
		file, created, err = openToWrite(path, size)
		return file, err
	})
	if err == nil || up.strict {
		return file, created, err
	}
	fd, err := missing.File(up.user, path, err)
	if err != nil {
		return nil, false, err
	}
	if err := asuser.Do(up.user, func() error { return ready(fd, path, size) }); err != nil {
		up.undo(fd, path)
		_ = unix.Close(fd)
		return nil, false, err
	}
	return os.NewFile(uintptr(fd), path), true, nil
}

// undo removes the new file that fd has open.
func (up *uploader) undo(fd int, path string) {
	err := asuser.Do(up.user, func() error { return removeOpened(fd, path) })
	err = missing.Remove(up.user, path, fd, err)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		up.api.Log.Warn("files", "unfinished upload not removed", "path", path, "error", err.Error())
	}
}

func uploadError(path string, err error) error {
	var pathErr *os.PathError
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return err
	case errors.Is(err, unix.ENOTSUP):
		return fail(http.StatusBadRequest, "the file system of '%s' cannot store metadata", path)
	case errors.As(err, &pathErr):
		return fmt.Errorf("error writing file '%s': %w", path, pathErr.Err)
	case errors.Is(err, gzip.ErrHeader), errors.Is(err, gzip.ErrChecksum), errors.Is(err, io.ErrUnexpectedEOF):
		return fail(http.StatusBadRequest, "body of '%s' ended early or is damaged: %w", path, err)
	}
	return fail(http.StatusBadRequest, "error reading the body of '%s': %w", path, err)
}

// openToWrite opens path for a whole new content; call it as the user. The
// file is written in place: hard links, mode and open readers keep their
// meaning. A size known ahead that cannot fit is refused before the old
// content goes. It also says whether the file is new.
func openToWrite(path string, size int64) (_ *os.File, created bool, _ error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, false, fmt.Errorf("error creating directories of '%s': %w", path, err)
	}
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_NONBLOCK
	fd, err := openSafely(path, flags|unix.O_EXCL, 0o666)
	created = err == nil
	if errors.Is(err, unix.EEXIST) {
		fd, err = openSafely(path, flags, 0o666)
	}
	switch {
	case errors.Is(err, unix.EISDIR):
		return nil, false, fail(http.StatusBadRequest, "path '%s' is a directory", path)
	case errors.Is(err, unix.ENXIO):
		return nil, false, fail(http.StatusBadRequest, "path '%s' is not a regular file", path)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return nil, false, err
	case err != nil:
		return nil, false, fmt.Errorf("error opening file '%s': %w", path, err)
	}
	if err = ready(fd, path, size); err != nil {
		if created {
			_ = removeOpened(fd, path)
		}
		_ = unix.Close(fd)
		return nil, false, err
	}
	return os.NewFile(uintptr(fd), path), created, nil
}

// removeOpened removes path if it still names the file that fd has open; call
// it as the user.
func removeOpened(fd int, path string) error {
	var opened, named unix.Stat_t
	if err := unix.Fstat(fd, &opened); err != nil {
		return err
	}
	if err := unix.Lstat(path, &named); err != nil {
		return err
	}
	if opened.Dev != named.Dev || opened.Ino != named.Ino {
		return nil
	}
	return unix.Unlink(path)
}

// ready empties an open file for size bytes (negative: unknown).
func ready(fd int, path string, size int64) error {
	if err := onlyRegular(fd, path); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	var disk unix.Statfs_t
	if size > 0 && unix.Fstatfs(fd, &disk) == nil && disk.Blocks > 0 {
		if free := int64(disk.Bavail)*disk.Bsize + st.Blocks*512; size > free {
			return unix.ENOSPC
		}
	}
	if st.Size == 0 {
		return nil // truncating would tell watchers of a write that changed nothing
	}
	return unix.Ftruncate(fd, 0)
}
