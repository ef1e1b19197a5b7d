package filesystem

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/filesystem"
	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/missing"
	"emberbox/agent/internal/paths"
	"emberbox/agent/internal/rpc"
	"emberbox/agent/internal/transfer"
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
	err = asuser.Do(u, func() error { _, err := os.Lstat(from); return err })
	if err != nil {
		return nil, rpc.FileError(err)
	}
	err = asuser.Do(u, func() error { return os.MkdirAll(filepath.Dir(to), 0o755) })
	if err = missing.Dirs(u, filepath.Dir(to), err); err != nil {
		return nil, rpc.FileError(err)
	}
	err = asuser.Do(u, func() error {
		err := os.Rename(from, to)
		if errors.Is(err, syscall.EXDEV) {
			// Another file system, or a directory of a read-only layer, which overlayfs cannot rename.
			return transfer.Move(from, to)
		}
		return err
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
