package filesystem

import (
	"context"
	"os"
	"path/filepath"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/filesystem"
	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/paths"
	"emberbox/agent/internal/rpc"
)

// Move renames an entry; missing parents of the destination are made.
func (s *Service) Move(_ context.Context, req *connect.Request[pb.MoveRequest]) (*connect.Response[pb.MoveResponse], error) {
	u, from, err := s.at(req.Header(), req.Msg.GetSource())
	if err != nil {
		return nil, err
	}
	to, err := paths.Resolve(req.Msg.GetDestination(), u.Home, s.who.State.DefaultWorkdir())
	if err != nil {
		return nil, rpc.Invalid("invalid destination: %w", err)
	}
	err = asuser.Do(u, func() error {
		if _, err := os.Lstat(from); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		return move(from, to)
	})
	if err != nil {
		return nil, rpc.FileError(err)
	}
	s.log.Debug("filesystem", "moved", "source", from, "destination", to, "user", u.Name)
	e, err := s.stat(u, to)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.MoveResponse{Entry: e}), nil
}

func move(from, to string) error { return os.Rename(from, to) }
