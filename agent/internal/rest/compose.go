package rest

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"

	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/missing"
)

// maxSources bounds one compose request.
const maxSources = 10_000

type composeRequest struct {
	SourcePaths []string `json:"source_paths"`
	Destination string   `json:"destination"`
	Username    string   `json:"username"`
}

// Compose joins files into one and removes them: the last step of an upload in
// parts. The joined file appears whole or not at all.
func (a *API) Compose(w http.ResponseWriter, r *http.Request) {
	var req composeRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxInit)).Decode(&req); err != nil {
		Fail(w, http.StatusBadRequest, fmt.Sprintf("malformed body of /files/compose: %v", err))
		return
	}
	done, err := a.compose(req)
	if err != nil {
		failWith(w, err)
		return
	}
	reply(w, done)
}

func (a *API) compose(req composeRequest) (*written, error) {
	if len(req.SourcePaths) == 0 || len(req.SourcePaths) > maxSources {
		return nil, fail(http.StatusBadRequest, "source_paths must name 1 to %d files, got %d", maxSources, len(req.SourcePaths))
	}
	if req.Destination == "" {
		return nil, fail(http.StatusBadRequest, "destination is required")
	}
	u, err := a.user(req.Username)
	if err != nil {
		return nil, err
	}
	to, err := a.path(u, req.Destination)
	if err != nil {
		return nil, err
	}
	sources := make([]string, len(req.SourcePaths))
	for i, given := range req.SourcePaths {
		if given == "" {
			return nil, fail(http.StatusBadRequest, "source_paths[%d] is empty", i)
		}
		if sources[i], err = a.path(u, given); err != nil {
			return nil, err
		}
	}
	err = asuser.Do(u, func() error { return os.MkdirAll(filepath.Dir(to), 0o755) })
	if err = missing.Dirs(u, filepath.Dir(to), err); err != nil {
		return nil, fmt.Errorf("error creating directories of '%s': %w", to, err)
	}
	if err := asuser.Do(u, func() error { return join(sources, to) }); err != nil {
		return nil, err
	}
	a.Log.Debug("files", "composed", "path", to, "user", u.Name, "parts", fmt.Sprint(len(sources)))
	return &written{Name: filepath.Base(to), Type: "file", Path: to}, nil
}

func join(sources []string, to string) error {
	if info, err := os.Stat(to); err == nil && info.IsDir() {
		return fail(http.StatusBadRequest, "path '%s' is a directory", to)
	}
	part := filepath.Join(filepath.Dir(to), ".composing-"+rand.Text())
	out, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return fmt.Errorf("error opening file '%s': %w", to, err)
	}
	for _, from := range sources {
		if err = appendFile(out, from); err != nil {
			break
		}
	}
	if closeErr := out.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(part, to)
	}
	if err != nil {
		_ = os.Remove(part)
		return err
	}
	for _, from := range sources {
		if from == to {
			continue
		}
		if err := os.Remove(from); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("'%s' is composed, but its part '%s' could not be removed: %w", to, from, err)
		}
	}
	return nil
}

func appendFile(out *os.File, from string) error {
	in, err := openToRead(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	_, err = io.Copy(out, in) // copy_file_range: no copy through memory, and none at all on file systems that share blocks
	return err
}
