package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/filesystem"
	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/entry"
	"emberbox/agent/internal/rpc"
	"emberbox/agent/internal/users"
)

// Stat describes one entry.
func (s *Service) Stat(_ context.Context, req *connect.Request[pb.StatRequest]) (*connect.Response[pb.StatResponse], error) {
	u, path, err := s.at(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	e, err := s.stat(u, path)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.StatResponse{Entry: e}), nil
}

func (s *Service) stat(u *users.User, path string) (*pb.EntryInfo, error) {
	e, err := asuser.Get(u, func() (*pb.EntryInfo, error) { return entry.Stat(s.who.Users, path) })
	if errors.Is(err, fs.ErrNotExist) {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("file not found: %w", err))
	}
	return e, rpc.FileError(err)
}
