package rest

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"emberbox/agent/internal/asuser"
)

// download sends a file: whole, a range of it, or compressed when that is all
// the client accepts.
func (a *API) download(w http.ResponseWriter, r *http.Request) {
	if err := a.mayUse(r, "read"); err != nil {
		failWith(w, err)
		return
	}
	u, err := a.user(r.URL.Query().Get("username"))
	if err != nil {
		failWith(w, err)
		return
	}
	path, err := a.path(u, r.URL.Query().Get("path"))
	if err != nil {
		failWith(w, err)
		return
	}
	zip, err := wantsGzip(r.Header)
	if err != nil {
		failWith(w, err)
		return
	}
	file, err := asuser.Get(u, func() (*os.File, error) { return openToRead(path) })
	if err != nil {
		failWith(w, err)
		return
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		failWith(w, err)
		return
	}
	a.Log.Debug("files", "read", "path", path, "user", u.Name)
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store") // a change within Last-Modified's second would pass for none
	h.Add("Vary", "Accept-Encoding")
	if d := mime.FormatMediaType("inline", map[string]string{"filename": filepath.Base(path)}); d != "" {
		h.Set("Content-Disposition", d)
	}
	switch {
	case zip && r.Method == http.MethodGet:
		h.Set("Content-Encoding", "gzip")
		sendGzip(w, file)
	case info.Size() == 0 && r.Method == http.MethodGet:
		// Files of /proc and /sys have a size of 0 and content all the same.
		_, _ = io.Copy(w, struct{ io.Reader }{file})
	default:
		http.ServeContent(w, r, "", info.ModTime(), file)
	}
}

// openToRead opens a regular file; call it as the user. Opening does not block
// on a pipe, and passes no magic link: /proc/self would be emberd's own.
func openToRead(path string) (*os.File, error) {
	fd, err := openSafely(path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fail(http.StatusNotFound, "path '%s' does not exist", path)
		}
		return nil, fmt.Errorf("error opening file '%s': %w", path, err)
	}
	if err := onlyRegular(fd, path); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// onlyRegular refuses what is not a regular file and makes the descriptor blocking.
func onlyRegular(fd int, path string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return unix.SetNonblock(fd, false)
	case unix.S_IFDIR:
		return fail(http.StatusBadRequest, "path '%s' is a directory", path)
	}
	return fail(http.StatusBadRequest, "path '%s' is not a regular file", path)
}

// wantsGzip decides the encoding of a download. gzip is sent when nothing but
// gzip is named (how clients ask for it) or identity is refused; a general
// list such as a browser's gets the file as it is, which is many times faster
// than compressing it here.
func wantsGzip(h http.Header) (bool, error) {
	if h.Get("Range") != "" {
		return false, nil
	}
	gzipOK, others, identityOK := false, false, true
	star := -1.0
	for part := range strings.SplitSeq(strings.Join(h.Values("Accept-Encoding"), ","), ",") {
		name, params, _ := strings.Cut(part, ";")
		name = strings.ToLower(strings.TrimSpace(name))
		q := 1.0
		if v, ok := strings.CutPrefix(strings.ReplaceAll(params, " ", ""), "q="); ok {
			if parsed, err := strconv.ParseFloat(v, 64); err == nil {
				q = parsed
			}
		}
		switch name {
		case "":
		case "gzip", "x-gzip":
			gzipOK = q > 0
		case "identity":
			identityOK = q > 0
			others = others || q > 0
		case "*":
			star = q
		default:
			others = others || q > 0
		}
	}
	if star == 0 && !others {
		identityOK = false
	}
	switch {
	case gzipOK && (!others || !identityOK):
		return true, nil
	case identityOK:
		return false, nil
	case star > 0:
		return true, nil
	}
	return false, fail(http.StatusNotAcceptable, "no acceptable encoding found, supported: [identity, gzip]")
}

func sendGzip(w http.ResponseWriter, file *os.File) {
	zip, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{zip}, struct{ io.Reader }{file}, make([]byte, 256<<10)); err != nil {
		panic(http.ErrAbortHandler) // an honest end of stream would pass off a part as the whole
	}
	_ = zip.Close()
}
