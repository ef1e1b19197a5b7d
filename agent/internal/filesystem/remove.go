package filesystem

import (
	"context"
	"os"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/filesystem"
	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/rpc"
)

// Remove removes an entry and all below it. Nothing there is success.
func (s *Service) Remove(_ context.Context, req *connect.Request[pb.RemoveRequest]) (*connect.Response[pb.RemoveResponse], error) {
	u, path, err := s.at(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if path == "/" {
		return nil, rpc.Invalid("refusing to remove /")
	}
	if err := asuser.Do(u, func() error { return os.RemoveAll(path) }); err != nil {
		return nil, rpc.FileError(err)
	}
	s.log.Debug("filesystem", "removed", "path", path, "user", u.Name)
	return connect.NewResponse(&pb.RemoveResponse{}), nil
}
