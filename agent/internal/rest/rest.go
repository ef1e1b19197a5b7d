// Package rest serves the agent's plain HTTP routes, one file a route.
package rest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strconv"
	"sync"
	"syscall"

	"emberbox/agent/internal/cgroup"
	"emberbox/agent/internal/entry"
	"emberbox/agent/internal/host"
	"emberbox/agent/internal/logs"
	"emberbox/agent/internal/paths"
	"emberbox/agent/internal/sandbox"
	"emberbox/agent/internal/usage"
	"emberbox/agent/internal/users"
)

// API holds what the routes need.
type API struct {
	State *sandbox.State
	Users *users.DB
	Log   *logs.Log
	// Run runs a program of the machine as root.
	Run host.Runner
	// Meter measures the machine.
	Meter *usage.Meter
	// Clock is the host's; nil where only the node can tell the time.
	Clock *host.HostClock
	// Cgroups holds what clients started; nil where the machine has none of its own.
	Cgroups *cgroup.Manager
	// Disk is an open directory of the writable disk; negative for the root.
	Disk int

	frozen sync.Mutex // one freeze operation at a time
}

// failure is an error with the status it answers.
type failure struct {
	status int
	err    error
}

func (f failure) Error() string { return f.err.Error() }
func (f failure) Unwrap() error { return f.err }

func fail(status int, format string, args ...any) error {
	return failure{status, fmt.Errorf(format, args...)}
}

// Fail writes an error in the agent's shape, `{code, message}`.
func Fail(w http.ResponseWriter, status int, message string) {
	h := w.Header()
	h.Del("Content-Encoding")
	h.Del("Content-Length")
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}{status, message})
}

func reply(w http.ResponseWriter, body any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(body)
}

// failWith maps an error to its status. Source of the statuses: the agent's OpenAPI page.
func failWith(w http.ResponseWriter, err error) {
	var f failure
	var meta entry.MetadataError
	var user users.UnknownError
	status := http.StatusInternalServerError
	switch {
	case errors.As(err, &f):
		status = f.status
	case errors.As(err, &user):
		status = http.StatusUnauthorized
	case errors.As(err, &meta):
		status = http.StatusBadRequest
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		status, err = http.StatusInsufficientStorage, errors.New("not enough disk space available")
	case errors.Is(err, syscall.EAGAIN):
		status = http.StatusTooManyRequests
	case errors.Is(err, fs.ErrNotExist):
		status = http.StatusNotFound
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENAMETOOLONG):
		status = http.StatusBadRequest
	}
	Fail(w, status, err.Error())
}

// user returns the named user, or the default one.
func (a *API) user(name string) (*users.User, error) {
	if name == "" {
		name = a.State.DefaultUser()
	}
	u, err := a.Users.Lookup(name)
	if err != nil {
		return nil, fail(http.StatusUnauthorized, "error looking up user '%s': %w", name, err)
	}
	return u, nil
}

func (a *API) path(u *users.User, path string) (string, error) {
	abs, err := paths.Resolve(path, u.Home, a.State.DefaultWorkdir())
	if err != nil {
		return "", fail(http.StatusBadRequest, "invalid path '%s': %w", path, err)
	}
	return abs, nil
}

// number reads an optional whole number of the query.
func number(r *http.Request, name string) (int64, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0, fail(http.StatusBadRequest, "query parameter '%s' must be a whole number, got '%s'", name, text)
	}
	return n, nil
}
