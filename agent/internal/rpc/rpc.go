// Package rpc holds what both Connect services share: who asks, how often to
// say that a stream lives, and which code an error gets.
package rpc

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"emberbox/agent/internal/sandbox"
	"emberbox/agent/internal/users"
)

// Who finds the user that a request acts as.
type Who struct {
	State *sandbox.State
	Users *users.DB
}

// User returns the user named by the Basic authorization header, or the default user.
//
// Errors: Unauthenticated for a malformed header or an unknown user.
func (w Who) User(h http.Header) (*users.User, error) {
	name := w.State.DefaultUser()
	if auth := h.Get("Authorization"); auth != "" {
		given, ok, err := basicUser(auth)
		if err != nil {
			return nil, connect.NewError(connect.CodeUnauthenticated, err)
		}
		if ok {
			name = given
		}
	}
	u, err := w.Users.Lookup(name)
	if err != nil {
		return nil, connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("invalid username: '%s': %w", name, err))
	}
	return u, nil
}

// basicUser reads the name out of `Basic base64(name:password)`. Another
// scheme names nobody: an edge or a client library may add one.
func basicUser(auth string) (string, bool, error) {
	scheme, rest, _ := strings.Cut(auth, " ")
	if !strings.EqualFold(scheme, "Basic") {
		return "", false, nil
	}
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(rest))
	if err != nil {
		return "", false, errors.New("malformed Authorization header: want 'Basic base64(name:)'")
	}
	name, _, _ := strings.Cut(string(raw), ":")
	return name, name != "", nil
}

const (
	keepaliveHeader  = "Keepalive-Ping-Interval"
	defaultKeepalive = 90 * time.Second
)

// Keepalive is how long a stream may be silent, from the header in whole seconds.
func Keepalive(h http.Header) time.Duration {
	n, err := strconv.ParseUint(h.Get(keepaliveHeader), 10, 31)
	if err != nil || n == 0 {
		return defaultKeepalive
	}
	return time.Duration(n) * time.Second
}

// Ended is the error of a stream whose context ended: its deadline, or its caller went away.
func Ended(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return connect.NewError(connect.CodeDeadlineExceeded, context.DeadlineExceeded)
	}
	return connect.NewError(connect.CodeCanceled, context.Canceled)
}

// FileError gives a file-system error the code that clients match on.
func FileError(err error) error {
	var known *connect.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	code := connect.CodeInternal
	switch {
	case errors.Is(err, fs.ErrNotExist):
		code = connect.CodeNotFound
	case errors.Is(err, fs.ErrExist), errors.Is(err, syscall.ENOTEMPTY):
		code = connect.CodeAlreadyExists
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		code = connect.CodePermissionDenied
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENAMETOOLONG),
		errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.EISDIR):
		code = connect.CodeInvalidArgument
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EMFILE),
		errors.Is(err, syscall.EAGAIN):
		code = connect.CodeResourceExhausted
	}
	return connect.NewError(code, err)
}

// Invalid is an InvalidArgument error.
func Invalid(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
}
