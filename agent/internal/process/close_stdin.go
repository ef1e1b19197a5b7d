package process

import (
	"context"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/process"
)

// CloseStdin ends a process's stdin.
func (s *Service) CloseStdin(ctx context.Context, req *connect.Request[pb.CloseStdinRequest]) (*connect.Response[pb.CloseStdinResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := inputError(ctx, p.CloseStdin()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.CloseStdinResponse{}), nil
}
