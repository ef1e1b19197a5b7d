package filesystem

import (
	"context"
	"fmt"
	"os"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/filesystem"
	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/missing"
	"emberbox/agent/internal/rpc"
)

// MakeDir makes a directory and its missing parents, all the user's.
func (s *Service) MakeDir(_ context.Context, req *connect.Request[pb.MakeDirRequest]) (*connect.Response[pb.MakeDirResponse], error) {
	u, path, err := s.at(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	err = asuser.Do(u, func() error {
		if info, err := os.Stat(path); err == nil {
			if info.IsDir() {
				return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("directory already exists: %s", path))
			}
			return rpc.Invalid("path already exists but it is not a directory: %s", path)
		}
		return os.MkdirAll(path, 0o755)
	})
	if err = missing.Dirs(u, path, err); err != nil {
		return nil, rpc.FileError(err)
	}
	s.log.Debug("filesystem", "made directory", "path", path, "user", u.Name)
	e, err := s.stat(u, path)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.MakeDirResponse{Entry: e}), nil
}
