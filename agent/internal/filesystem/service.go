// Package filesystem serves E2B's file-system service, one file an RPC.
package filesystem

import (
	"net/http"
	"sync"

	"emberbox/agent/gen/filesystem/filesystemconnect"
	"emberbox/agent/internal/logs"
	"emberbox/agent/internal/paths"
	"emberbox/agent/internal/rpc"
	"emberbox/agent/internal/users"
)

// Service implements filesystem.Filesystem.
type Service struct {
	who rpc.Who
	log *logs.Log

	mu       sync.Mutex
	watchers map[string]*pending
}

var _ filesystemconnect.FilesystemHandler = (*Service)(nil)

// New returns the service.
func New(who rpc.Who, log *logs.Log) *Service {
	return &Service{who: who, log: log, watchers: map[string]*pending{}}
}

// at returns the asking user and the absolute path meant.
func (s *Service) at(h http.Header, path string) (*users.User, string, error) {
	u, err := s.who.User(h)
	if err != nil {
		return nil, "", err
	}
	abs, err := paths.Resolve(path, u.Home, s.who.State.DefaultWorkdir())
	if err != nil {
		return nil, "", rpc.Invalid("invalid path: %w", err)
	}
	return u, abs, nil
}
